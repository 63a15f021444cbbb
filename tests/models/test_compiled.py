"""Compiled layers give what layers give for any sizes of batches, and where they cannot be made nothing breaks."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.qwen import QWEN, plain_qwen
from torch._inductor import config as inductor_config

from quarterlight import Item
from quarterlight.errors import InputError
from quarterlight.models.embedder import Embedder

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="torch.compile needs a C++ compiler"
)


@pytest.fixture
def items(picture: Any) -> list[Any]:
    rng = np.random.default_rng(0)
    texts = [" ".join(["apple"] * int(rng.integers(1, 20))) for _ in range(4)]
    pages = [Item(image=picture(n, 64 + 64 * n, 128), max_tiles=4, text="a page") for n in range(2)]
    return [*texts, *pages, picture(7), {"text": "two", "image": [picture(8), picture(9)]}]


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_compiled_is_eager(tiny_checkpoint: Path, tiny_embedder: Embedder, items: list[Any]) -> None:
    torch._dynamo.reset()
    with inductor_config.patch(compile_threads=1):
        embedder = Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu", compile=True)
    compiled = embedder.compiled
    assert compiled is not None
    assert (compiled.tower, compiled.language_model, compiled.failure) == (2, 2, "")
    assert embedder.model_hash == tiny_embedder.model_hash
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    rng = np.random.default_rng(1)
    for number in (8, 5, 1):
        some = [items[place] for place in rng.permutation(len(items))[:number]]
        found = embedder.encode_document(some)
        np.testing.assert_allclose(found, tiny_embedder.encode_document(some), rtol=0, atol=1e-5)
    assert embedder.work.layers_compiled > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made  # no size of a batch compiles anything anew


def test_where_torch_cannot_compile(
    tiny_checkpoint: Path,
    tiny_embedder: Embedder,
    items: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with caplog.at_level(logging.WARNING):
        embedder = Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu", compile=True)
    assert "no compiler" in caplog.text and "long story" not in caplog.text
    assert embedder.compiled is not None
    assert embedder.compiled.tower == embedder.compiled.language_model == 0
    assert "language model: RuntimeError: no compiler" in embedder.compiled.failure
    np.testing.assert_allclose(embedder.encode_document(items), tiny_embedder.encode_document(items), rtol=0, atol=1e-6)
    assert embedder.work.layers_compiled == 0


def test_unknown_mode(tiny_checkpoint: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'reduce-overhead'"):
        Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu", compile="reduce_overhead")


@pytest.mark.parametrize("kind", QWEN)
def test_other_families(
    kind: str, tmp_path: Path, tokenizer: Any, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plain_qwen(kind, tmp_path / kind, tokenizer)
    items = ["a red apple", {"text": "the same, but blue", "image": picture(1, 32, 48)}]
    expected = Embedder(folder, dtype=torch.float32, device="cpu").encode_query(items)
    monkeypatch.setattr(torch, "compile", lambda plain, **_: plain)
    embedder = Embedder(folder, dtype=torch.float32, device="cpu", compile=True)
    assert embedder.compiled is not None
    assert (embedder.compiled.tower, embedder.compiled.failure) == (0, "")
    assert embedder.compiled.language_model == embedder.model.config.text_config.num_hidden_layers
    np.testing.assert_array_equal(embedder.encode_query(items), expected)
    assert embedder.work.layers_compiled > 0


def test_what_goes_wrong_later(tiny_checkpoint: Path, tiny_embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def first_only(plain: Any, **_: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(plain)
            if len(calls) > 10:
                raise torch._dynamo.exc.TorchRuntimeError("out of luck")
            return plain(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", first_only)
    embedder = Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu", compile=True)
    for _ in range(2):
        found = embedder.encode_document(["a", "b c"])
        np.testing.assert_allclose(found, tiny_embedder.encode_document(["a", "b c"]), rtol=0, atol=1e-6)
    assert embedder.work.layers_compiled == 2  # of the first row, since then none
    assert len(calls) == 11
    assert embedder.compiled is not None and "out of luck" in embedder.compiled.failure
