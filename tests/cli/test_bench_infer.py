"""Latency and throughput: all systems give the same embeddings, and what is counted is what is computed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from quarterlight.cli import bench_infer
from quarterlight.cli.main import program
from quarterlight.cli.measure import MemoryPeak, rounds
from quarterlight.errors import CheckpointError
from quarterlight.models.embedder import Embedder
from quarterlight.records import Item

BATCHES, AHEAD, BEGINNINGS, ONCE = (
    "batches by tokens",
    "pictures decoded meanwhile",
    "beginnings read once",
    "same picture once",
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_infer, "ceiling_of", lambda *_: {"matmul_tflops": 0.1, "read_gb_s": 10.0})
    monkeypatch.setattr(bench_infer, "PICTURE_PIXELS", (60, 80))
    monkeypatch.setattr(bench_infer, "PAGE_PIXELS", (160, 160))
    monkeypatch.setattr(bench_infer, "WORDS", (1, 2, 3, 4, 5, 6, 7, 8, 9, 10))


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(program(), ["bench", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_throughput(tiny_checkpoint: Path) -> None:
    arguments = ("--model", str(tiny_checkpoint), "--items", "10", "--repeats", "1", "--dtype", "float32")
    record = run("throughput", *arguments, "--workload", "mixed")
    (mixed,) = record["workloads"]
    assert mixed["items"] == {"text": 4, "image": 4, "page": 2}
    ours, plain = (mixed["systems"][name] for name in (bench_infer.OURS, bench_infer.OURS_1))
    assert ours["ours_times_faster"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert plain["tokens"] - ours["tokens"] == (4 + 2 * 5) * (16 - 4)  # tokens of 14 tiles of the tiny model
    assert plain["tokens"] == mixed["systems"][bench_infer.TRANSFORMERS]["tokens"]
    assert ours["items_per_s"] == pytest.approx(1e3 / ours["ms_per_item"]["median"], rel=1e-2)
    assert max(mixed["largest_difference"].values()) < 1e-5
    assert set(record["fast_paths"]) == {BATCHES, BEGINNINGS}, "ten tiny items are read before the model begins"
    assert not {bench_infer.COMPILED, bench_infer.INT8} & {*mixed["systems"], *record["fast_paths"]}


def test_queries_with_one_instruction(tiny_checkpoint: Path) -> None:
    arguments = ("--model", str(tiny_checkpoint), "--repeats", "1", "--dtype", "float32", "--workload", "queries")
    record = run("throughput", *arguments)
    (queries,) = record["workloads"]
    assert queries["items"] == {"text": 16}
    assert [*queries["systems"]] == [bench_infer.OURS, bench_infer.UNSHARED]
    assert queries["work"]["rows_sharing"] == queries["work"]["rows"] == 16
    assert queries["work"]["tokens"] == queries["systems"][bench_infer.OURS]["tokens"]
    assert queries["work"]["tokens_spared"] == 15 * 60
    assert 15 * 60 + 16 * 18 < queries["work"]["tokens"] < 16 * (60 + 20 + 10)
    assert set(record["fast_paths"]) == {BATCHES, BEGINNINGS}
    assert "16 of 16 rows" in record["fast_paths"][BEGINNINGS]


def test_latency(tiny_checkpoint: Path) -> None:
    arguments = ("--model", str(tiny_checkpoint), "--items", "2", "--repeats", "1", "--dtype", "float32")
    record = run("latency", *arguments, "--system", "sentence-transformers")
    assert [load["workload"] for load in record["workloads"]] == ["text", "image", "page"]
    assert [*record["workloads"][0]["systems"]] == [bench_infer.OURS, bench_infer.SENTENCE_TRANSFORMERS]
    assert not record["fast_paths"], "of one item, there is nothing to spare and nothing to do meanwhile"


@pytest.mark.parametrize(
    ("options", "missing", "more"),
    [
        ({}, set(), set()),
        ({"tokens_per_batch": 1}, {BATCHES, BEGINNINGS}, set()),  # no two rows meet
        ({"num_workers": 0}, {AHEAD}, set()),
        ({"shared_prefix": False}, {BEGINNINGS}, set()),
        ({"packed": True}, {BEGINNINGS}, {"rows without padding"}),
    ],
)
def test_a_fast_path_that_is_off_is_not_named(
    options: dict[str, Any], missing: set[str], more: set[str], tiny_embedder: Embedder, picture: Any
) -> None:
    model = tiny_embedder
    options = {"tokens_per_batch": 300, "num_workers": 1, **options}
    embedder = Embedder.from_model(model.model, model.processor, model.settings, **options)
    texts = [Item(text=f"an apple, {number}", instruction="Find these words.") for number in range(20)]
    shown = [Item(image=picture(number % 20), text=f"number {number}") for number in range(24)]
    # the model takes as long as the one thread needs for all that it was given before this
    slow = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda *_: embedder._workers.submit(lambda: None).result()
    )
    try:
        embedder.encode_document([*texts, *shown])
    finally:
        slow.remove()
    named = set(bench_infer._fast_paths(embedder, [{"work": asdict(embedder.work)}]))
    assert named == {BATCHES, AHEAD, BEGINNINGS, ONCE} - missing | more


def test_what_one_window_of_different_pictures_cannot_spare_is_not_named(tiny_embedder: Embedder, picture: Any) -> None:
    embedder = Embedder.from_model(tiny_embedder.model, tiny_embedder.processor, tiny_embedder.settings)
    embedder.encode_document([Item(image=picture(number)) for number in range(3)])
    assert not {ONCE, AHEAD} & {*bench_infer._fast_paths(embedder, [{"work": asdict(embedder.work)}])}


def test_changed_weights_run_when_they_are_named(tiny_checkpoint: Path) -> None:
    pytest.importorskip("torchao", reason="needs the extra int8")
    arguments = ("--model", str(tiny_checkpoint), "--items", "1", "--repeats", "1", "--dtype", "float32")
    record = run("latency", *arguments, "--system", bench_infer.INT8)
    (load, *_) = record["workloads"]
    assert [*load["systems"]] == [bench_infer.OURS, bench_infer.INT8]
    assert load["largest_difference"][bench_infer.INT8] > 1e-6
    assert record["fast_paths"][bench_infer.INT8] == "weights of layers as int8"
    assert bench_infer.COMPILED not in record["fast_paths"]


def test_systems_that_disagree_are_an_error(tiny_embedder: Embedder) -> None:
    rows = np.eye(2, dtype=np.float32)
    systems = {name: bench_infer.System(lambda _: rows, s) for name, s in (("a", 2), ("b", 1), ("c", 2))}
    assert bench_infer._differences({"a": rows, "b": rows[::-1], "c": rows}, systems, "float32")["b"] == 0
    with pytest.raises(CheckpointError, match="c and a disagree"):
        bench_infer._differences({"a": rows, "b": rows, "c": rows[::-1]}, systems, "float32")
    turned = np.array([[np.cos(0.1), np.sin(0.1)], [0, 1]], dtype=np.float32)  # one row of two, to a cosine of 0.995
    with pytest.raises(CheckpointError, match=r"their lowest cosine is 0\.9950"):
        bench_infer._differences({"a": rows, "b": rows, "c": turned}, systems, "bfloat16")
    near = np.array([[np.cos(0.02), np.sin(0.02)], [0, 1]], dtype=np.float32)
    assert bench_infer._differences({"a": rows, "b": rows, "c": near}, systems, "bfloat16")["c"] > 0.01
    systems["c"] = systems["c"]._replace(exact=False)
    assert bench_infer._differences({"a": rows, "b": rows, "c": rows[::-1]}, systems, "float32")["c"] == 1


def test_operations_are_those_that_torch_counts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    embedder = Embedder(tiny_checkpoint, dtype=torch.float32, device="cpu", num_workers=0, tokens_per_batch=1)
    embedder.model.set_attn_implementation("eager")
    groups = bench_infer._items(tmp_path / "files", {"image": 0.5, "page": 0.5}, 2)
    tokens, flop = bench_infer._work(embedder, groups)
    with FlopCounterMode(display=False) as counted:
        bench_infer._encode_ours(embedder, groups)
    lengths = [bench_infer._work(embedder, [group])[0] for group in groups]
    assert sum(lengths) == tokens
    later = sum(2 * 4 * length**2 * 32 / 2 for length in lengths)  # eager attention also computes what it masks
    assert flop + later == pytest.approx(counted.get_total_flops(), rel=5e-3)


def test_a_shape_is_built_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_values: Any) -> None:
    from quarterlight.models import shapes
    from quarterlight.models.internvl_vtc import processing
    from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig

    values = {**tiny_values, "text_config": {**tiny_values["text_config"], "vocab_size": 1100}}
    monkeypatch.setattr(shapes, "internvl3_config", lambda _, **more: InternVLVTCConfig(**values, **more))
    monkeypatch.setattr(processing.InternVLVTCImageProcessor, "size", {"height": 64, "width": 64})
    folder = bench_infer._checkpoint(tmp_path, "1B", torch.float32)
    assert Embedder(folder, dtype=torch.float32, device="cpu").encode_document(["a text"]).shape == (1, 32)


def test_unknown_names() -> None:
    for arguments, message in (
        (["throughput", "--workload", "mix"], "Did you mean 'mixed'"),
        (["latency", "--system", "transformer"], "Did you mean 'transformers'"),
        (["latency", "--dtype", "int8"], "float32 or bfloat16"),
    ):
        result = CliRunner().invoke(program(), ["bench", *arguments])
        assert result.exit_code == 1
        assert message in result.output


@pytest.mark.parametrize("number", [3, 4, 7])
def test_there_are_as_many_items_as_were_asked_for(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_infer, "PICTURE_PIXELS", (60, 80))
    monkeypatch.setattr(bench_infer, "PAGE_PIXELS", (160, 160))
    for name, mixture in bench_infer.MIXTURES.items():
        if mixture:
            groups = bench_infer._items(tmp_path / name, mixture, number)
            assert sum(len(items) for _, items in groups) == number and all(items for _, items in groups)


def test_peaks_are_taken_before_times(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Peak(MemoryPeak):
        def __enter__(self) -> MemoryPeak:
            done.append("peak")
            return super().__enter__()

    def encode(_: Any) -> Any:
        done.append("run")
        return np.ones((1, 2), dtype=np.float32)

    monkeypatch.setattr(bench_infer, "MemoryPeak", Peak)
    bench = bench_infer._Run(model="", shape=None, repeats=2, dtype=None, device="cpu", one_by_one=False)
    found: dict[str, Any] = {}
    peaks: dict[str, float | None] = {}
    rounds({"a": lambda: bench._encode("a", bench_infer.System(encode, 1), [], found, peaks)}, 2, "cpu")
    assert done == ["peak", "run", "run", "run"]
    assert set(found) == set(peaks) == {"a"}


def test_rounds_take_turns() -> None:
    order: list[str] = []
    times = rounds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, "cpu")
    assert "".join(order) == "ba" + "ab" + "ba"
    assert [len(one) for one in times.values()] == [2, 2]


def test_memory_peak_sees_what_is_let_go_again() -> None:
    with MemoryPeak("cpu") as peak:
        block = np.ones(2**26, dtype=np.uint8)
        del block
    assert peak.mb is None or 60 < peak.mb < 200
