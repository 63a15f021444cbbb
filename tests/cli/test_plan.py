"""``quarterlight train --dry-run``: the plan as it is printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from quarterlight.cli.main import program

RECIPE = Path(__file__).parents[2] / "recipes" / "magic_mm_2b.yaml"


def test_the_plan_stands_beside_the_papers_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    result = CliRunner().invoke(program(), ["train", str(RECIPE), "--dry-run"])
    assert result.exit_code == 0, result.output
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "warmup 16.6M (16M) 6,144 5,406 0.0002 1.25M 805K 18.5M 33 22h56m (22h57m)" in rows
    assert any(row.startswith("hard_negatives 16.6M (16M) 3,072 10,812 ") for row in rows)
    assert any(row.startswith("finetune 1.55M (1.5M) 576 5,376 ") for row in rows)
    assert "Utilisation: 8.4%" in result.stdout and "calibrated on Table 9" in result.stdout
    assert "meant for" not in result.stdout and "In brackets: what the paper reports" in result.stdout
    assert "visual tokens of 0%" not in result.stdout


def test_a_recipe_without_the_papers_figures() -> None:
    nano = RECIPE.with_name("nano.yaml")
    result = CliRunner().invoke(program(), ["train", str(nano), "--dry-run"])
    assert result.exit_code == 1
    assert result.stderr.endswith("does not say how many `samples` it has: give --data, where it lies.\n")


def test_u_marvels_batches_steps_and_learning_rates_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its specification; of distillation, a tenth of the queries."""
    monkeypatch.setenv("COLUMNS", "160")
    result = CliRunner().invoke(program(), ["train", str(RECIPE.with_name("u_marvel_7b.yaml")), "--dry-run"])
    assert result.exit_code == 0 and "In brackets" not in result.stdout
    rows = {line.split()[0]: line.split()[1:5] for line in result.stdout.splitlines() if line[:1].islower()}
    assert rows["text_pairs"] == ["275K", "576", "955", "0.0002"]
    assert rows["caption_pairs"] == ["595K", "3,840", "155", "0.0001"]
    assert rows["warmup"] == ["1.33M", "3,840", "347", "0.0004"]
    assert rows["hard_negatives"] == ["1.33M", "1,088", "1,225", "1.5e-05"]
    assert rows["rerank"] == ["1.33M", "512", "2,604", "2e-05"]
    assert rows["distill"] == ["133K", "128", "1,042", "1e-05"]


def test_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    command = ["train", str(RECIPE), "--dry-run", "--device", "L20", "--devices", "8"]
    result = CliRunner().invoke(program(), [*command, "--set", "restore=null"])
    assert result.exit_code == 0, result.output
    assert "on 8 L20" in result.stdout and "8 x 119.5 TFLOP/s" in result.stdout
    assert "meant for 48 devices, not 8" in result.stdout
