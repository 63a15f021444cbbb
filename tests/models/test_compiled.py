"""Compiled layers give what layers give for any sizes of batches, and where they cannot be made nothing breaks."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.qwen import QWEN, plain_qwen
from torch._dynamo.testing import CompileCounter
from torch._inductor import config as inductor_config

from quarterlight import Item
from quarterlight.errors import InputError
from quarterlight.models.checkpoint import load_backbone, load_settings, save_checkpoint
from quarterlight.models.embedder import Embedder
from quarterlight.models.internvl_vtc import InternVLVTCConfig, InternVLVTCModel
from quarterlight.models.pooling import Attention, PoolingMode

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="torch.compile needs a C++ compiler"
)


@pytest.fixture
def items(picture: Any) -> list[Any]:
    rng = np.random.default_rng(0)
    texts = [" ".join(["apple"] * int(rng.integers(1, 20))) for _ in range(4)]
    pages = [Item(image=picture(n, 64 + 64 * n, 128), max_tiles=4, text="a page") for n in range(2)]
    return [*texts, *pages, picture(7), {"text": "two", "image": [picture(8), picture(9)]}]


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_values: dict[str, Any]) -> Path:
    """As ``tiny_checkpoint``, with one layer in the tower and one in the language model."""
    values = dict(tiny_values)
    for part in ("vision_config", "text_config"):
        values[part] = values[part] | {"num_hidden_layers": 1}
    return saved(tmp_path_factory.mktemp("models") / "small", tiny_checkpoint, values)


def saved(folder: Path, like: Path, values: dict[str, Any], **settings: Any) -> Path:
    """A random model of other sizes or settings, with the processor of another."""
    torch.manual_seed(0)
    model = InternVLVTCModel(InternVLVTCConfig(**values, visual_token_compression=2))
    return save_checkpoint(folder, model, load_backbone(like)[1], replace(load_settings(like), **settings))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch.compile takes functions apart, and counts how often, but makes no other code: seconds instead of a minute."""
    torch._dynamo.reset()
    counter, real = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda plain, **options: real(plain, **options, backend=counter))
    return counter


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_compiled_is_eager(one_layer: Path) -> None:
    torch._dynamo.reset()
    plain, texts = Embedder(one_layer, dtype=torch.float32, device="cpu"), ["one", "two three"]
    with inductor_config.patch(compile_threads=1):
        embedder = Embedder(one_layer, dtype=torch.float32, device="cpu", compile=True)
    compiled = embedder.compiled
    assert compiled is not None
    assert (compiled.tower, compiled.language_model, compiled.failure) == (1, 1, "")
    assert embedder.model_hash == plain.model_hash
    np.testing.assert_allclose(embedder.encode_document(texts), plain.encode_document(texts), rtol=0, atol=1e-5)
    assert embedder.work.layers_compiled > 0


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": ({}, {}),
    "bidirectional": ({"attention": Attention.BIDIRECTIONAL, "pooling": PoolingMode.MEAN}, {}),
    "packed": ({}, {"packed": True}),
    "merging": ({}, {"vision_token_merging": 0.5}),
}
"""Settings of the checkpoint, and options of the embedder, that change how layers are called."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore")
def test_nothing_is_compiled_after_the_warm_up(
    way: str, tmp_path: Path, tiny_checkpoint: Path, tiny_values: dict[str, Any], items: list[Any], traced: Any
) -> None:
    settings, options = WAYS[way]
    values = tiny_values | {"vision_config": tiny_values["vision_config"] | {"num_hidden_layers": 3}}
    folder = saved(tmp_path / "model", tiny_checkpoint, values, **settings)
    options = {"dtype": torch.float32, "device": "cpu", "tokens_per_batch": 300, **options}
    plain, embedder = Embedder(folder, **options), Embedder(folder, compile=True, **options)
    assert embedder.compiled is not None
    assert (embedder.compiled.tower, embedder.compiled.language_model, embedder.compiled.failure) == (3, 2, "")
    made = traced.frame_count
    assert made >= 3
    rng = np.random.default_rng(1)
    for number in (8, 5, 1):
        some = [items[place] for place in rng.permutation(len(items))[:number]]
        np.testing.assert_allclose(embedder.encode_document(some), plain.encode_document(some), rtol=0, atol=1e-5)
    for texts in (["one"] * 2, ["one", "two"], ["one", "two three", "four"]):
        np.testing.assert_allclose(embedder.encode_query(texts), plain.encode_query(texts), rtol=0, atol=1e-5)
    assert embedder.work.layers_compiled > 0
    assert traced.frame_count == made


@pytest.mark.filterwarnings("ignore")
def test_each_embedder_has_its_own_limit(one_layer: Path, traced: Any, caplog: pytest.LogCaptureFixture) -> None:
    """torch stops to compile a function after so many cases, with an error that is no TorchDynamoException."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    expected = Embedder(one_layer, **options).encode_document(["a", "b c"])
    with torch._dynamo.config.patch(recompile_limit=2):
        embedders = [Embedder(one_layer, compile=True, **options) for _ in range(2)]
        for embedder in embedders:
            assert embedder.compiled is not None
            assert (embedder.compiled.tower, embedder.compiled.language_model) == (1, 1), embedder.compiled.failure
        embedder.model.language_model.layers.train()  # another case, the third; nothing drops out
        np.testing.assert_allclose(embedder.encode_document(["a", "b c"]), expected, rtol=0, atol=1e-5)
    assert "Layers of the language model run as ever" in caplog.text
    assert embedder.compiled is not None
    assert (embedder.compiled.tower, embedder.compiled.language_model) == (1, 0)
    assert "FailOnRecompileLimitHit" in embedder.compiled.failure


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
    failed = [f"{part}: RuntimeError: no compiler" for part in ("vision tower", "language model")]
    assert embedder.compiled.failure == "; ".join(failed)
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
            if len(calls) > 14:
                raise torch._dynamo.exc.TorchRuntimeError("out of luck")
            return plain(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", first_only)
    embedder = Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu", compile=True)
    for _ in range(2):
        found = embedder.encode_document(["a", "b c"])
        np.testing.assert_allclose(found, tiny_embedder.encode_document(["a", "b c"]), rtol=0, atol=1e-6)
    assert embedder.work.layers_compiled == 2  # of the first row, since then none
    assert len(calls) == 15
    assert embedder.compiled is not None and "out of luck" in embedder.compiled.failure
    assert (embedder.compiled.tower, embedder.compiled.language_model) == (2, 0)
