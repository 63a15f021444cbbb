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
from quarterlight.models import compiled
from quarterlight.models.checkpoint import load_backbone, load_settings, save_checkpoint
from quarterlight.models.embedder import Embedder
from quarterlight.models.internvl_vtc import InternVLVTCConfig, InternVLVTCModel
from quarterlight.models.pooling import Attention

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
    """traced(class): torch.compile traces layers of this class, and counts how often, but makes no other code of them,
    which would take a minute; other layers it leaves alone."""
    torch._dynamo.reset()
    counter, real = CompileCounter(), torch.compile

    def only(layer: str) -> CompileCounter:
        def compile(plain: Any, **options: Any) -> Any:
            return real(plain, **options, backend=counter) if plain.__qualname__.startswith(layer) else plain

        monkeypatch.setattr(torch, "compile", compile)
        return counter

    return only


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_compiled_is_eager(one_layer: Path, picture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real compiler, which takes long: one function for the tower and, without padding, one for texts."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "TILES", (3,))
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "packed": True}
    plain = Embedder(one_layer, **options)
    with inductor_config.patch(compile_threads=1):
        embedder = Embedder(one_layer, compile=True, **options)
    found = embedder.compiled
    assert found is not None
    assert (found.tower, found.language_model, found.failure) == (1, 1, "")
    assert embedder.model_hash == plain.model_hash
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for some in (["one", "two three"], [Item(image=picture(1, 128, 128), max_tiles=4), "four", picture(2)]):
        np.testing.assert_allclose(embedder.encode_document(some), plain.encode_document(some), rtol=0, atol=1e-5)
    assert embedder.work.layers_compiled > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made  # no size of a batch compiles anything anew


@pytest.mark.filterwarnings("ignore")
def test_bidirectional_layers_are_warmed_up(one_layer: Path, tmp_path: Path, traced: Any, items: list[Any]) -> None:
    """Rows of one length are given no mask."""
    model, processor = load_backbone(one_layer)
    settings = replace(load_settings(one_layer), attention=Attention.BIDIRECTIONAL)
    folder = save_checkpoint(tmp_path / "model", model, processor, settings)
    compiles_nothing_more(folder, traced("Qwen2"), items, most=3)


@pytest.mark.filterwarnings("ignore")
def test_merging_layers_are_warmed_up(
    tmp_path: Path, tiny_checkpoint: Path, tiny_values: dict[str, Any], traced: Any, items: list[Any]
) -> None:
    """The first is given no bias, and all of them another number of patches."""
    values = tiny_values | {"vision_config": tiny_values["vision_config"] | {"num_hidden_layers": 3}}
    folder = saved(tmp_path / "model", tiny_checkpoint, values)
    compiles_nothing_more(folder, traced("InternVLVision"), items, most=4, vision_token_merging=0.5)


def compiles_nothing_more(folder: Path, counter: CompileCounter, items: list[Any], *, most: int, **more: Any) -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "tokens_per_batch": 300, **more}
    plain, embedder = Embedder(folder, **options), Embedder(folder, compile=True, **options)
    assert embedder.compiled is not None and embedder.compiled.failure == ""
    made = counter.frame_count
    assert 2 <= made <= most
    for some in (items, items[4:6], items[:1], items[6:7], ["one"] * 2, ["one", "two"], ["one", "two three", "four"]):
        np.testing.assert_allclose(embedder.encode_document(some), plain.encode_document(some), rtol=0, atol=1e-5)
    assert embedder.work.layers_compiled > 0
    assert counter.frame_count == made


@pytest.mark.filterwarnings("ignore")
def test_each_embedder_has_its_own_limit(one_layer: Path, traced: Any, caplog: pytest.LogCaptureFixture) -> None:
    """torch stops to compile a function after so many cases, with an error that is no TorchDynamoException."""
    counter, options = traced("Qwen2"), {"dtype": torch.float32, "device": "cpu", "packed": True}
    expected = Embedder(one_layer, **options).encode_document(["a", "b c"])
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            embedder = Embedder(one_layer, compile=True, **options)
            assert embedder.compiled is not None
            assert (embedder.compiled.language_model, embedder.compiled.failure) == (1, "")
        assert counter.frame_count == 2
        np.testing.assert_allclose(embedder.encode_document(["a", "b c"]), expected, rtol=0, atol=1e-5)
        assert counter.frame_count == 2 and embedder.work.layers_compiled > 0
        embedder.model.language_model.layers.train()  # another case, the second; nothing drops out
        np.testing.assert_allclose(embedder.encode_document(["a", "b c"]), expected, rtol=0, atol=1e-5)
    assert "Layers of the language model run as ever" in caplog.text
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
            if len(calls) > 12:
                raise torch._dynamo.exc.TorchRuntimeError("out of luck")
            return plain(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", first_only)
    embedder = Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu", compile=True)
    for _ in range(2):
        found = embedder.encode_document(["a", "b c"])
        np.testing.assert_allclose(found, tiny_embedder.encode_document(["a", "b c"]), rtol=0, atol=1e-6)
    assert embedder.work.layers_compiled == 2  # of the first row, since then none
    assert len(calls) == 13
    assert embedder.compiled is not None and "out of luck" in embedder.compiled.failure
    assert (embedder.compiled.tower, embedder.compiled.language_model) == (2, 0)
