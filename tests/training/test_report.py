"""The page about a run: what it says of stages that are finished, begun and missing, and its counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from quarterlight.manifest import environment
from quarterlight.training.report import _duration, _smooth, write_report

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "model": {"checkpoint": "somewhere"},
    "restore": {"data": []},
    "warmup": {"teacher_weight": 2.0},
    "mine": {"depth": 5},
    "judge": {"backend": "labels"},
}


def finish(folder: Path, *, seconds: int = 30, log: list[dict[str, float]] | None = None, **recipe: Any) -> None:
    folder.mkdir()
    manifest = {"stage": folder.name, "recipe": RECIPE | recipe, "seconds": seconds, "environment": environment()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if log is not None:
        state = {"global_step": max(int(line["step"]) for line in log), "log_history": log}
        (folder / "trainer_state.json").write_text(json.dumps(state))


def write_table(file: Path, **columns: Any) -> None:
    pq.write_table(pa.table(columns), file)


def rows(page: Path) -> dict[str, list[str]]:
    """First cell of each row of the page's tables -> the others; of a repeated first cell, the last."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.read_text().splitlines() if "|" in line]
    return {row[0]: row[1:] for row in cells}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    finish(
        tmp_path / "restore",
        seconds=100,
        log=[
            {"step": 10, "loss": 4.0},
            {"step": 10, "eval_loss": 3.5, "eval_loss_icons_mdi_i2t": 3.25},
            {"step": 20, "loss": 2.0},
        ],
    )
    p1 = {"eval_p1_easy_vqa_it2t": 0.25, "eval_p1_emoji_t2i": 0.75, "eval_p1_mean": 0.5}
    worse = dict.fromkeys(p1, 0.1)
    finish(
        tmp_path / "warmup",
        seconds=7200,
        log=[
            {"step": 10, "loss": 5.0, "utilisation": 0.5},
            {"step": 10, **worse},
            {"step": 1500, "loss": 1.25, "utilisation": 0.875},
            {"step": 1500, **p1},
        ],
    )
    return tmp_path


def test_stages(run: Path) -> None:
    (run / "warmup" / "unreadable.txt").write_text("a.png\nb.png\n")
    (run / "finetune.running").mkdir()
    page = write_report(run, [run / name for name in ("restore", "warmup", "mine", "finetune")])
    assert page == run / "report.md"
    found = rows(page)
    assert found["restore"] == ["1.7 min", "20", "4.000 → 2.000", "3.500", "–", "–", "–"]
    assert found["warmup"] == ["2.0 h", "1,500", "5.000 → 1.250", "–", "50.0%", "88%", "2"]
    assert found["mine"][0] == "not run" and found["finetune"][0] == "begun, not finished"
    text = page.read_text()
    assert text.startswith("# tiny\n\nSeed 3, ")
    assert "The loss of warmup includes the distance to the teacher" in text
    assert "## Mined" not in text and "## Judged" not in text


def test_validation_is_that_of_the_last_step(run: Path) -> None:
    found = rows(write_report(run, [run / "restore", run / "warmup"]))
    assert found["**mean**"] == ["**50.0%**"]
    assert (found["easy_vqa/it2t"], found["emoji/t2i"]) == (["25.0%"], ["75.0%"])
    assert found["after steps"] == ["1,500"]


def test_held_out_loss_of_each_source(run: Path) -> None:
    found = rows(write_report(run, [run / "restore"]))
    assert found["held-out loss of restore"] == ["step 10"]
    assert (found["**all**"], found["icons_mdi/i2t"]) == (["**3.500**"], ["3.250"])


def test_plots_are_pictures_that_the_page_shows(run: Path) -> None:
    text = write_report(run, [run / "restore", run / "warmup"]).read_text()
    for name in ("loss", "validation", "tasks"):
        assert f"(report-{name}.png)" in text
        with Image.open(run / f"report-{name}.png") as picture:
            assert picture.format == "PNG" and picture.width >= 400
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10
    assert sorted(file.name for file in run.iterdir() if file.is_file()) == [
        "report-loss.png",
        "report-tasks.png",
        "report-validation.png",
        "report.md",
    ]


def test_plots_of_an_earlier_run_go_away(run: Path) -> None:
    write_report(run, [run / "restore", run / "warmup"])
    text = write_report(run, [run / "restore"]).read_text()
    assert [file.name for file in run.glob("*.png")] == ["report-loss.png"]
    assert "No stage measured P@1" in text


def test_negatives_are_counted(run: Path) -> None:
    finish(run / "mine")
    finish(run / "judge")
    write_table(
        run / "mine" / "easy_vqa.it2t.parquet",
        qid=["a", "a", "b"],
        did=["x", "y", "z"],
        score=[0.5, 0.25, 0.75],
        rank=[50, 61, 99],
    )
    none = pa.array([], pa.string())
    write_table(run / "mine" / "emoji.t2i.parquet", qid=none, did=none, score=none, rank=none)
    page = write_report(run, [run / "mine"])
    assert "| mine | easy_vqa/it2t | 2 | 3 | 1.5 | 50 to 99 | 0.500 |" in page.read_text()
    assert "| mine | emoji/t2i | 0 | 0 | – | – | – |" in page.read_text()
    for name in ("easy_vqa.it2t", "emoji.t2i"):
        write_table(
            run / "judge" / f"{name}.parquet",
            relevant=[True, True, None, False, False],
            judge=["labels"] * 5,
        )
    failed = {"tasks": {"emoji/t2i": {"failed": 3}}}
    (run / "judge" / "report.json").write_text(json.dumps(failed))
    (run / "judge" / "report.html").write_text("<!doctype html>")
    page = write_report(run, [run / "mine", run / "judge"])
    assert rows(page)["emoji/t2i"] == ["8", "2", "2", "1", "3", "labels"]
    assert rows(page)["**all**"][:5] == ["**13**", "**4**", "**4**", "**2**", "**3**"]
    assert "(judge/report.html)" in page.read_text()


def test_a_stage_of_another_recipe_is_named(run: Path) -> None:
    finish(run / "mine", seed=4, mine={"depth": 7}, judge={"backend": "endpoint"})
    finish(run / "judge")
    text = write_report(run, [run / name for name in ("restore", "warmup", "mine", "judge")]).read_text()
    assert "`mine` was made with another seed, mine: see" in text
    assert text.count("was made with another") == 1
    assert "backend: labels" in text


def test_nothing_is_finished(tmp_path: Path) -> None:
    text = write_report(tmp_path, [tmp_path / "warmup"]).read_text()
    assert "No stage is finished yet" in text and "| warmup | not run |" in text
    assert not list(tmp_path.glob("*.png"))


def test_small_helpers() -> None:
    assert [_duration(seconds) for seconds in (None, 42, 90, 3 * 3600)] == ["–", "42 s", "1.5 min", "3.0 h"]
    assert _smooth([1.0, 2.0, 4.0]) == [1.0, 2.0, 4.0]
    assert _smooth([0.0] * 10 + [3.0] + [0.0] * 10)[8:13] == [0.0, 1.0, 1.0, 1.0, 0.0]
