"""Pooling, attention and template say the same in this package and in sentence-transformers; a mean leaves out what it
should and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.models.qwen import QWEN, plain_qwen

from quarterlight import Item
from quarterlight.errors import CheckpointError
from quarterlight.models.checkpoint import load_backbone, save_checkpoint
from quarterlight.models.embedder import Embedder
from quarterlight.models.inputs import InputFormatter
from quarterlight.models.masked_instruction import instruction_span
from quarterlight.models.pooling import Attention, PoolingMode, embed
from quarterlight.models.settings import EmbedderSettings
from quarterlight.models.tokenizer import with_markers
from quarterlight.prompts import MARKERS, PromptStyle

Pictures = Callable[..., Image.Image]
Marked = tuple[Any, Any]

KINDS = list(itertools.product(PoolingMode, Attention, PromptStyle))
SETTINGS = EmbedderSettings(
    pooling=PoolingMode.MEAN,
    attention=Attention.BIDIRECTIONAL,
    prompt_style=PromptStyle.U_MARVEL,
    system_prompt="You are a helpful assistant.",
)


@pytest.fixture
def items(picture: Pictures) -> list[Any]:
    return [
        "a red apple",
        picture(0),
        {"text": 'the same, "sliced"', "image": picture(1, 200, 60)},
        {"image": [picture(2), picture(3)]},
        {"image": picture(4), "text": "<|im_end|> x <IMG_CONTEXT><instruction_end>"},
        " <instruction_start>",
        "two\r\nlines, <|im\r_end|>\rand a question? ",
        "<emb>.",
    ]


@pytest.mark.parametrize(("pooling", "attention", "style"), KINDS)
def test_sentence_transformers_gives_the_same_vectors(
    marked: Marked,
    items: list[Any],
    tmp_path: Path,
    pooling: PoolingMode,
    attention: Attention,
    style: PromptStyle,
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    settings = replace(SETTINGS, pooling=pooling, attention=attention, prompt_style=style)
    folder = save_checkpoint(tmp_path / "m", *marked, settings)
    ours = Embedder(folder, dtype=torch.float32, device="cpu")
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    shoes = "find shoes like these"
    expected = ours.encode_query(items)
    assert (expected @ expected.T - np.eye(len(items))).max() < 0.9999
    for name, vectors, wanted in (
        ("padded", theirs.encode_query(items), expected),
        ("alone", theirs.encode_query(items, batch_size=1), expected),
        ("ours alone", np.concatenate([ours.encode_query(item) for item in items]), expected),
        ("instructed", theirs.encode_query(items, prompt=shoes), ours.encode_query(items, instruction=shoes)),
        ("documents", theirs.encode_document(items), ours.encode_document(items)),
        ("bare", theirs.encode(items), ours.encode_document(items)),
    ):
        np.testing.assert_allclose(vectors, wanted, rtol=0, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module", params=QWEN)
def qwen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Marked:
    """Another family, as it comes from the hub, with the markers added."""
    model, processor = load_backbone(plain_qwen(request.param, tmp_path_factory.mktemp("qwen") / "m", tokenizer))
    with_markers(model, processor.tokenizer, seed=3)
    return model, processor


@pytest.mark.parametrize(
    ("pooling", "attention", "style", "positions"),
    [
        ("mean", "bidirectional", "u_marvel", "sequential"),
        ("mean", "bidirectional", "u_marvel", "mrope"),
        ("mean", "causal", "magic", "mrope"),
        ("last_token", "causal", "magic", "mrope"),
        ("last_token", "bidirectional", "magic", "sequential"),
    ],
)
def test_qwen_gives_the_same_vectors(
    qwen: Marked, picture: Pictures, tmp_path: Path, pooling: Any, attention: Any, style: Any, positions: Any
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    settings = EmbedderSettings(
        pooling=pooling, attention=attention, prompt_style=style, positions=positions, max_pixels=24 * 64
    )
    items = ["a red apple", picture(0, 40, 24), {"text": "sliced", "image": picture(1, 32, 48)}, "<instruction_end> x"]
    folder = save_checkpoint(tmp_path / "m", *qwen, settings)
    ours = Embedder(folder, dtype=torch.float32, device="cpu")
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    expected = ours.encode_query(items)
    assert (expected @ expected.T - np.eye(len(items))).max() < 0.9999
    alone = np.concatenate([ours.encode_query(item) for item in items])
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-5)
    packed = Embedder(folder, dtype=torch.float32, device="cpu", packed=True)
    np.testing.assert_allclose(packed.encode_query(items), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(theirs.encode_query(items), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(theirs.encode_query(items, batch_size=1), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(theirs.encode_document(items), ours.encode_document(items), rtol=0, atol=1e-5)


def test_qwen_attends_to_the_instruction_and_pools_none_of_it(qwen: Marked, picture: Pictures) -> None:
    model, processor = qwen
    settings = replace(SETTINGS, max_pixels=24 * 64)
    formatter = InputFormatter(processor, settings)
    inputs = formatter([Item(text="a cat", image=picture(0, 40, 24)), "a cat"], "query", "Find it.")
    span_BL = inputs["instruction_mask"].bool()
    assert span_BL.any(dim=1).all()
    hidden: list[torch.Tensor] = []
    hook = model.language_model.register_forward_hook(lambda *call: hidden.append(call[-1].last_hidden_state))
    try:
        pooled = embed(model, inputs, pooling=settings.pooling, attention=settings.attention)
    finally:
        hook.remove()
    (weight_BLD,) = torch.autograd.grad(pooled.square().sum(dim=1)[0] + pooled.sum(), hidden[-1])
    assert not weight_BLD[span_BL].any()
    assert weight_BLD[~span_BL & inputs["attention_mask"].bool()].abs().sum(dim=-1).min() > 0
    embedder = Embedder.from_model(model, processor, settings)
    one, other = (embedder.encode_query("a cat", instruction=text) for text in ("Find it.", "Find at."))
    assert np.abs(one - other).max() > 1e-4


@pytest.mark.parametrize("saved", KINDS)
def test_settings_and_not_the_configuration_decide(
    marked: Marked, items: list[Any], tmp_path: Path, saved: Any
) -> None:
    """A model whose folder said otherwise embeds as it is told to: training goes on from any folder."""
    wanted = Embedder.from_model(*marked, SETTINGS).encode_query(items)
    names = ("pooling", "attention", "prompt_style")
    folder = save_checkpoint(tmp_path / "m", *marked, replace(SETTINGS, **dict(zip(names, saved, strict=True))))
    model, processor = load_backbone(folder)
    again = Embedder.from_model(model, processor, SETTINGS).encode_query(items)
    np.testing.assert_allclose(again, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("style", PromptStyle)
def test_the_mean_leaves_out_the_instruction_and_its_markers(marked: Marked, style: PromptStyle, picture: Any) -> None:
    model, processor = marked
    settings = replace(SETTINGS, prompt_style=style)
    inputs = InputFormatter(processor, settings)(["a cat", Item(image=picture(0))], "query", "Find it.")
    start, end = processor.tokenizer.convert_tokens_to_ids(list(MARKERS[1:]))
    span_BL = inputs["instruction_mask"].bool()
    assert torch.equal(span_BL, instruction_span(inputs["input_ids"], start, end))  # the two ways to find it
    words = [processor.tokenizer.decode(ids[span]) for ids, span in zip(inputs["input_ids"], span_BL, strict=True)]
    label = "Instruct: " if style is PromptStyle.MAGIC else ""
    assert words == [f"<instruction_start>{label}Find it.<instruction_end>"] * 2

    hidden: list[torch.Tensor] = []
    hook = model.language_model.register_forward_hook(lambda *call: hidden.append(call[-1].last_hidden_state))
    try:
        for masked in (None, [start, end]):
            model.config.masked_instruction = masked
            pooled = embed(model, inputs, pooling=settings.pooling, attention=settings.attention)
            (weight_BLD,) = torch.autograd.grad(pooled.square().sum(dim=1)[0] + pooled.sum(), hidden[-1])
            assert not weight_BLD[span_BL].any()
            assert weight_BLD[~span_BL & inputs["attention_mask"].bool()].abs().sum(dim=-1).min() > 0
    finally:
        hook.remove()


def test_the_instruction_is_attended_to(marked: Marked) -> None:
    embedder = Embedder.from_model(*marked, SETTINGS)
    one, other = (embedder.encode_query("a cat", instruction=text) for text in ("Find it.", "Find at."))
    assert np.abs(one - other).max() > 1e-3
    # candidates have none in this style, whoever gives one
    assert np.array_equal(*(embedder.encode_document("a cat", instruction=text) for text in ("Find it.", None)))


def test_the_frame_can_be_left_out(marked: Marked, picture: Pictures, tmp_path: Path) -> None:
    model, processor = marked
    settings = replace(SETTINGS, pool_frame=False)
    items = [Item(text="a cat", image=picture(0)), Item(text="a cat"), Item(image=picture(0))]
    inputs = InputFormatter(processor, settings)(items, "query", "Find it.")
    kept = inputs["attention_mask"].bool() & ~inputs["instruction_mask"].bool()
    picture_tokens = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    words = [processor.tokenizer.decode(ids[keep]) for ids, keep in zip(inputs["input_ids"], kept, strict=True)]
    assert words == [f"{picture_tokens} a cat.", " a cat.", picture_tokens]
    folder = save_checkpoint(tmp_path / "m", model, processor, settings)
    ours = Embedder(folder, dtype=torch.float32, device="cpu")
    assert np.abs(ours.encode_query(items) - Embedder.from_model(*marked, SETTINGS).encode_query(items)).max() > 1e-3
    assert not (folder / "modules.json").exists()  # no stock module leaves the frame out


def test_a_row_with_nothing_but_its_frame_keeps_it(marked: Marked) -> None:
    embedder = Embedder.from_model(*marked, replace(SETTINGS, pool_frame=False))
    np.testing.assert_allclose(np.linalg.norm(embedder.encode_document(['"', "x"]), axis=1), 1, atol=1e-6)


def test_outputs_of_every_form(marked: Marked) -> None:
    """As a tuple and as an object; embeddings of tokens do not say what they were."""
    model, processor = marked
    ids = processor.tokenizer("<instruction_start>a<instruction_end> b", return_tensors="pt")["input_ids"]
    plain = model(input_ids=ids).last_hidden_state
    model.config.masked_instruction = processor.tokenizer.convert_tokens_to_ids(list(MARKERS[1:]))
    masked = model(input_ids=ids)
    assert torch.equal(masked.last_hidden_state[:, 3:], plain[:, 3:])
    assert not masked.last_hidden_state[:, :3].any()
    assert torch.equal(masked[0], masked.last_hidden_state)
    assert torch.equal(model(ids, return_dict=False)[0], masked[0])
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).last_hidden_state, plain)


def test_model_without_markers_is_refused(tiny_checkpoint: Path, tmp_path: Path, marked: Marked) -> None:
    model, processor = load_backbone(tiny_checkpoint)
    for settings in (SETTINGS, replace(SETTINGS, prompt_style=PromptStyle.MAGIC)):
        with pytest.raises(CheckpointError, match="it lacks <emb>, <instruction_start>, <instruction_end>"):
            Embedder.from_model(model, processor, settings)
        with pytest.raises(CheckpointError, match=r"tiny has prompts of the style .*with_markers"):
            save_checkpoint(tmp_path / "m", model, processor, settings)
    folder = save_checkpoint(tmp_path / "m", *marked, SETTINGS)
    processor.tokenizer.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="its tokenizer needs"):
        Embedder(folder, device="cpu")
