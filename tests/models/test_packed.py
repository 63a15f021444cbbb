"""Alone, padded, packed: one embedding, whatever the backbone and whatever a token may look at."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.models.qwen import QWEN, plain_qwen

from quarterlight.models.backbones import backbone_of
from quarterlight.models.checkpoint import load_backbone
from quarterlight.models.embedder import Embedder
from quarterlight.models.inputs import InputFormatter
from quarterlight.models.packed import embed_packed
from quarterlight.models.pooling import Attention, PoolingMode, embed
from quarterlight.models.settings import EmbedderSettings
from quarterlight.models.shared_prefix import common_prefix, embed_shared_prefix
from quarterlight.models.tokenizer import with_markers
from quarterlight.records import Item

Pictures = Callable[..., Image.Image]


@pytest.fixture(scope="module", params=["internvl_vtc", *QWEN])
def backbone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, tiny_checkpoint: Path
) -> Any:
    """Model and processor, s = 2."""
    folder = tiny_checkpoint
    if request.param in QWEN:
        folder = plain_qwen(request.param, tmp_path_factory.mktemp("packed") / request.param, tokenizer)
    model, processor = load_backbone(folder, visual_token_compression=2)
    with_markers(model, processor.tokenizer, seed=0)  # which a mean needs
    return model, processor


@pytest.fixture
def items(picture: Pictures) -> list[Any]:
    return [
        "a red apple",
        picture(0, 40, 24),
        {"text": "the same, but blue and a good deal longer than the others", "image": picture(1, 32, 48)},
        {"image": [picture(2, 30, 20), picture(3, 16, 60)]},
        Item(image=picture(4, 90, 70), max_tiles=2, text="a page"),
        "x",
    ]


def make(backbone: Any, attention: Attention, pooling: PoolingMode, **options: Any) -> Embedder:
    settings = EmbedderSettings(attention=attention, pooling=pooling, max_pixels=40 * 64)
    return Embedder.from_model(*backbone, settings, num_workers=0, **options)


@pytest.mark.parametrize("pooling", list(PoolingMode))
@pytest.mark.parametrize("attention", list(Attention))
def test_alone_is_padded_is_packed(backbone: Any, items: list[Any], attention: Attention, pooling: PoolingMode) -> None:
    padded = make(backbone, attention, pooling).encode_document(items)
    packed = make(backbone, attention, pooling, packed=True).encode_document(items)
    small = make(backbone, attention, pooling, packed=True, tokens_per_batch=100).encode_document(items)
    alone = make(backbone, attention, pooling)
    single = np.concatenate([alone.encode_document([item]) for item in items])
    np.testing.assert_allclose(padded, single, atol=1e-5)
    np.testing.assert_allclose(packed, single, atol=1e-5)
    np.testing.assert_allclose(small, single, atol=1e-5)
    equal = alone.encode_document([items[0], "a red applf"])  # a batch without padding, where a mask is easily lost
    np.testing.assert_allclose(equal[0], single[0], atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bidirectional_means_every_token_sees_every_other(backbone: Any, items: list[Any], implementation: str) -> None:
    """The state of the first token, which causal attention cannot tell of anything, tells rows apart."""
    model, processor = backbone
    formatter = InputFormatter(processor, EmbedderSettings(max_pixels=40 * 64))
    model.set_attn_implementation(implementation)
    for batch in (items, items[:1]):
        inputs = formatter(batch, "query", "Find it.")
        first = {**inputs, "instruction_mask": torch.ones_like(inputs["input_ids"])}
        first["instruction_mask"][:, 0] = 0  # the mean of the first token alone
        for compute in (embed, embed_packed):
            causal, both = (compute(model, first, pooling=PoolingMode.MEAN, attention=one) for one in Attention)
            torch.testing.assert_close(causal, causal[:1].expand_as(causal), atol=1e-5, rtol=0)
            assert ((both - causal).norm(dim=1) > 1e-3).all()
            assert len(batch) == 1 or torch.pdist(both).min() > 1e-3
    model.set_attn_implementation("sdpa")


@torch.inference_mode()
def test_the_vision_tower_sees_as_ever(backbone: Any, items: list[Any]) -> None:
    """Attention of the language model is no business of the tower, which must say the same to the bit."""
    model, processor = backbone
    inputs = InputFormatter(processor, EmbedderSettings(max_pixels=40 * 64))(items, "query")
    seen: list[torch.Tensor] = []
    tower = backbone_of(model.config).parts(model)[0]
    hook = tower.register_forward_hook(lambda _, __, found: seen.append(found.last_hidden_state))
    for attention in Attention:
        for compute in (embed, embed_packed):
            compute(model, inputs, pooling=PoolingMode.MEAN, attention=attention)
    hook.remove()
    assert len(seen) == 4
    assert all(torch.equal(one, seen[0]) for one in seen)


@torch.inference_mode()
def test_a_shared_prefix_changes_nothing(backbone: Any, items: list[Any]) -> None:
    model, processor = backbone
    inputs = InputFormatter(processor, EmbedderSettings(max_pixels=40 * 64))(items, "query", "Find it.")
    assert common_prefix(inputs["input_ids"], inputs["attention_mask"], model.config.image_token_id) > 4
    plain = embed(model, inputs, pooling=PoolingMode.LAST_TOKEN, attention=Attention.CAUSAL)
    torch.testing.assert_close(embed_shared_prefix(model, inputs), plain, atol=1e-5, rtol=0)


def test_an_embedder_shares_prefixes_and_changes_nothing(backbone: Any, picture: Pictures) -> None:
    """Any mix of items and instructions, in batches of any size, of which some share and some do not."""
    draw = random.Random(0)
    words = ["a", "red", "apple", "and", "the", "same", "but", "blue"]

    def item(place: int) -> Item:
        text = " ".join(draw.choices(words, k=draw.randint(1, 12))) + f" {place}"
        shown = picture(place, draw.randint(20, 70), draw.randint(20, 70)) if draw.random() < 0.4 else None
        instruction = draw.choice([None, None, "Find what looks like it in every way.", ""])
        return Item(
            text=text if shown is None or draw.random() < 0.5 else None,
            image=shown,
            instruction=instruction if draw.random() < 0.95 else f"One of its own, {place}.",
            max_tiles=draw.choice([None, 2]),
        )

    items = [item(place) for place in range(32)]
    options: Any = {"attention": Attention.CAUSAL, "pooling": PoolingMode.LAST_TOKEN}
    plain = make(backbone, **options, shared_prefix=False)
    expected = plain.encode_query(items)
    assert plain.work.rows_sharing == plain.work.tokens_spared == 0
    for tokens_per_batch, least in ((2048, 13), (700, 4)):
        sharing = make(backbone, **options, tokens_per_batch=tokens_per_batch)
        np.testing.assert_allclose(sharing.encode_query(items), expected, atol=1e-5)
        assert sharing.work.rows == plain.work.rows and sharing.work.tokens == plain.work.tokens
        assert sharing.work.rows_sharing >= least
        assert sharing.work.tokens_spared >= 5 * least


def test_gradients_are_the_same_packed(backbone: Any, items: list[Any]) -> None:
    model, processor = backbone
    inputs = InputFormatter(processor, EmbedderSettings(max_pixels=40 * 64))(items, "query", "Find it.")
    weight = model.get_input_embeddings().weight
    found = []
    for compute in (embed, embed_packed):
        embedding_BD = compute(model, inputs, pooling=PoolingMode.MEAN, attention=Attention.BIDIRECTIONAL)
        direction = torch.randn(embedding_BD.shape, generator=torch.Generator().manual_seed(0))
        found.append(torch.autograd.grad((embedding_BD * direction).sum(), weight)[0])
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
