"""One pass over what rows have in common gives what one pass per row gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from quarterlight.models.embedder import Embedder
from quarterlight.models.inputs import InputFormatter
from quarterlight.models.pooling import Attention, PoolingMode, embed
from quarterlight.models.shared_prefix import common_prefix, embed_shared_prefix
from quarterlight.records import Item


@pytest.fixture
def formatter(tiny_embedder: Embedder) -> InputFormatter:
    return InputFormatter(tiny_embedder.processor, tiny_embedder.settings)


def batches(picture: Any) -> dict[str, list[Item]]:
    return {
        "texts": [Item(text="a red apple"), Item(text="b"), Item(text="something a good deal longer than the others")],
        "pictures": [Item(image=picture(1)), Item(image=picture(2))],
        "pages": [Item(image=picture(3, 200, 200), max_tiles=4), Item(image=picture(4))],
        "mixed": [Item(text="x"), Item(image=picture(5), text="y")],
        "equal": [Item(text="same"), Item(text="same")],
        "one": [Item(text="alone")],
    }


@pytest.mark.parametrize("name", ["texts", "pictures", "pages", "mixed", "equal", "one"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_the_plain_way(
    tiny_embedder: Embedder, formatter: InputFormatter, picture: Any, name: str, implementation: str
) -> None:
    model = copy.deepcopy(tiny_embedder.model)
    model.set_attn_implementation(implementation)
    inputs = formatter(batches(picture)[name], "query", "Find it.")
    assert common_prefix(inputs["input_ids"], inputs["attention_mask"], model.config.image_token_id) > 4
    plain = embed(model, inputs, pooling=PoolingMode.LAST_TOKEN, attention=Attention.CAUSAL)
    torch.testing.assert_close(embed_shared_prefix(model, inputs), plain, atol=1e-5, rtol=0)


def test_gradients_reach_the_common_part_from_every_row(tiny_embedder: Embedder, formatter: InputFormatter) -> None:
    model = tiny_embedder.model
    inputs = formatter(["a red apple", "a green pear", "plum"], "query", "Find it.")
    weight = model.get_input_embeddings().weight
    direction = torch.randn(3, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))

    def gradient(embedding: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad((embedding * direction).sum(), weight)[0]

    plain = gradient(embed(model, inputs, pooling=PoolingMode.LAST_TOKEN, attention=Attention.CAUSAL))
    torch.testing.assert_close(gradient(embed_shared_prefix(model, inputs)), plain, atol=1e-5, rtol=0)


def test_nothing_in_common(tiny_embedder: Embedder) -> None:
    inputs = {"input_ids": torch.tensor([[9, 10], [11, 12]]), "attention_mask": torch.ones(2, 2, dtype=torch.int64)}
    assert common_prefix(inputs["input_ids"], inputs["attention_mask"], 5) == 0
    plain = tiny_embedder.model(**inputs).last_hidden_state[:, -1]
    torch.testing.assert_close(
        embed_shared_prefix(tiny_embedder.model, inputs),
        torch.nn.functional.normalize(plain, dim=-1),
        atol=1e-5,
        rtol=0,
    )
