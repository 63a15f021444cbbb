from __future__ import annotations

import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quarterlight.evaluation.benchmark import averages
from quarterlight.evaluation.page import Heading, Paragraph, Points, Table, to_html, to_markdown
from quarterlight.evaluation.reference import Reference, per_dataset, references
from quarterlight.evaluation.report import averages_table, report_blocks, write_report
from quarterlight.evaluation.suites import Suite, load_suite


def record_of(suite: Suite, scores: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """What a run would have written whose tasks have these scores, in percent."""
    tasks = [
        {
            "name": task.name,
            "group": task.group,
            "in_distribution": task.in_distribution,
            "hub_id": task.hub_id,
            "split": task.split,
            "revision": task.revision,
            "rows_sha256": "0" * 64,
            "instructions": {"query": ["Find | it."], "document": []},
            "max_tiles": [1],
            "metric": task.metric,
            "ties": task.ties,
            "score": scores[task.name] / 100,
            "expected": scores[task.name] / 100,
            "trec_eval": None,
            "num_tied": 0,
            "readings": {},
            "reranked": None,
            "num_queries": 1000,
            "num_scored": 1000,
            "num_candidates": 5000,
            "num_scored_candidates": 5000,
            "num_left_out": 0,
            "num_lost_queries": 0,
            "chance": {task.metric: 0.001},
            "num_problems": 0,
            "problems": [],
        }
        for task in suite.tasks
        if task.name in scores
    ]
    return {
        "suite": suite.name,
        "title": suite.title,
        "tasks": tasks,
        "averages": averages(suite, tasks),
        "not_run": [],
        "cost": [],
        "model": {"name": "made-up", "hash": "abc"},
        "reranker": None,
        "settings": {"limit": None},
        "environment": {},
        **more,
    }


GROUPS = {
    "mmeb": ("Classification", "VQA", "Retrieval", "Grounding", "IND"),
    "visdoc": ("ViDoRe v1", "ViDoRe v2", "VisRAG", "OOD (old page ids)"),
}


def with_averages_of(suite: Suite, row: Reference) -> dict[str, float]:
    """Scores of the tasks, near to each other, with the published averages over these groups.

    The paper prints no scores by task.  Its other averages (OOD and overall; overall) follow from these groups, but
    only if every group has the right tasks.
    """
    names = [task.name for task in suite.tasks]
    groups = [one for one in suite.averages if one.name in GROUPS[suite.name]]
    assert len(groups) == len(GROUPS[suite.name]) and {one.name for one in groups} < set(row.scores)
    member_GT = np.array([[(name in one.of) / len(one.of) for name in names] for one in groups])
    target_G = np.array([row.scores[one.name] for one in groups])
    base_T = target_G @ member_GT / (member_GT.sum(axis=0) + 1e-9)  # of its groups, about
    room_T = 100 - base_T
    step_T, *_ = np.linalg.lstsq(member_GT * room_T, target_G - member_GT @ base_T, rcond=None)
    scores = base_T + room_T * step_T
    assert ((scores > -1e-9) & (scores < 100)).all()
    return dict(zip(names, scores.tolist(), strict=True))


def printed(markdown: str, label: str) -> list[float]:
    """The numbers of the first row of a page that has this label."""
    row = next(line for line in markdown.splitlines() if line.startswith(f"| {label} |"))
    cells = [cell.strip("* ") for cell in row.strip("|").split("|")]
    return [float(cell) for cell in cells if re.fullmatch(r"-?\d+\.\d", cell)]


@pytest.mark.parametrize("name", ["mmeb", "visdoc"])
def test_the_report_prints_the_averages_of_the_paper(name: str) -> None:
    """Tables 3 and 4 of Magic-MM-Embedding, to 0.1, also the averages that the scores were not made for."""
    suite = load_suite(name)
    rows = [row for row in references(name) if row.model.startswith("Magic-MM-Embedding")]
    assert len(rows) == 4
    for row in rows:
        scores = with_averages_of(suite, row)
        page = to_markdown([averages_table(suite, record_of(suite, scores))])
        columns = next(one for one in page.splitlines() if one.startswith("| model |")).split("|")[3:-1]
        ours = dict(zip([one.strip() for one in columns], printed(page, "**made-up**"), strict=True))
        for column, value in row.scores.items():
            assert ours[column] == pytest.approx(value, abs=0.1001), (row.label, column)
        # beside the row itself the difference is nothing
        line = next(one for one in page.splitlines() if one.startswith(f"| {row.label} |"))
        assert len(re.findall(r"\([+-]0\.[01]\)", line)) == len(row.scores)


def test_the_baselines_of_table_4_are_the_means_of_their_scores_by_dataset() -> None:
    """The rows of six baselines come from these scores: our averages of the scores of 24 datasets give the table."""
    suite = load_suite("visdoc")
    labels = {
        "gme-Qwen2-VL-2B-Instruct": ("GME", "2.2B"),
        "gme-Qwen2-VL-7B-Instruct": ("GME", "8.3B"),
        "colpali-v1.3": ("ColPali", "2.9B"),
        "VLM2Vec-V2.0-Qwen2VL-2B": ("VLM2Vec-V2", "2.2B"),
        "LamRA-Ret": ("LamRA-Qwen2", "8.3B"),
        "LamRA-Ret-Qwen2.5VL-7b": ("LamRA-Qwen2.5", "8.3B"),
    }
    by_dataset = {row.model: row for row in per_dataset("visdoc", "v2.0.0")}
    table = {(row.model, row.size): row for row in references("visdoc")}
    for model, key in labels.items():
        record = record_of(suite, by_dataset[model].scores)
        ours = {one["name"]: one["score"] for one in record["averages"]}
        for column, value in table[key].scores.items():
            assert 100 * ours[column] == pytest.approx(value, abs=0.1001), (model, column)


def test_differences_and_what_is_missing(tmp_path: Path) -> None:
    suite = load_suite("mmeb")
    scores = with_averages_of(suite, references("mmeb")[-1])
    del scores["GQA"]
    record = record_of(suite, scores, not_run=[{"name": "GQA", "reason": "its folder is missing"}])
    record["tasks"][0] |= {
        "num_scored": 990,
        "pinned_revision": None,
        "pictures_revision": "abc",
        "num_left_out": 2,
        "num_lost_queries": 7,
        "num_problems": 12,
        "problems": [{"id": f"q{n}", "reason": "a picture is missing"} for n in range(12)],
        "num_tied": 3,
    }
    page = write_report(tmp_path, suite, record).read_text(encoding="utf-8")
    own = next(line for line in page.splitlines() if line.startswith("| **made-up** | **ours**"))
    assert own.count("–") == 3  # VQA, OOD and Overall are over GQA too
    assert "VQA (1 of 10 missing)" in page and "Overall (1 of 36 missing)" in page
    assert "34,990 of 35,007 queries were scored, in 35 tasks. 2 rows of the files could not be used." in page
    assert "| ImageNet-1K | Classification, IND | precision@1 | 990 of 1,007 |" in page
    assert f"{suite.tasks[0].revision} (unpinned)" in page and "; pictures abc" in page
    assert "| GQA | not run |" in page and "GQA was not run: its folder is missing" in page
    assert "ImageNet-1K, q9: a picture is missing" in page and "ImageNet-1K: and 2 more" in page
    assert "optimistic" in page  # the official tie rule of MMEB, by name
    assert "VLM2Vec scores v2.0.0, task by task" in page
    classification = 100 * record["averages"][0]["score"]
    clip = references("mmeb")[0]
    assert f"| {clip.label} | zero-shot | 42.8 ({classification - 42.8:+.1f})" in page


class Links(HTMLParser):
    """Everything that a page would fetch, and whether its elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "path", "use", "br"):
            self.open.append(tag)
        self.fetched += [
            str(value) for key, value in attrs if key in ("src", "href") and not str(value).startswith("#")
        ]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_html_needs_no_other_file_and_is_the_same_twice(tmp_path: Path) -> None:
    suite = load_suite("mini")
    record = record_of(suite, {task.name: 30.0 + number for number, task in enumerate(suite.tasks)})
    for one in record["tasks"]:
        one["reranked"] = one["score"] + 0.1
    record["averages"] = averages(suite, record["tasks"])
    record["settings"] = {"limit": 20, "rerank": 5, "fusion_weight": 1.0}
    record["reranker"] = {"name": "judge <x>", "hash": "def"}
    write_report(tmp_path / "a", suite, record)
    write_report(tmp_path / "b", suite, record)
    text = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert text == (tmp_path / "b" / "report.html").read_text(encoding="utf-8")
    links = Links()
    links.feed(text)
    assert links.fetched == [] and links.open == []
    assert text.count("<svg") == 2 and "judge &lt;x&gt;" in text and "made-up, reranked" in text
    assert "At most 20 queries of each task were asked" in text
    for name in ("averages", "tasks"):
        assert (tmp_path / "a" / "plots" / f"{name}.svg").read_text(encoding="utf-8").startswith("<svg")


def test_a_report_names_the_weights_that_were_used() -> None:
    suite = load_suite("mini")
    record = record_of(suite, {task.name: 30.0 for task in suite.tasks}, reranker={"name": "judge", "hash": "def"})
    record["settings"] = {"limit": None, "rerank": 5, "fusion_weight": 1.0}
    assert "weight 1.0 beside the cosine" in to_markdown(report_blocks(suite, record)), "as older records say it"
    assert "weight of the reranker" not in to_markdown(report_blocks(suite, record))
    for number, one in enumerate(record["tasks"]):
        one["fusion_weight"] = 0.2 if number else 0.05
    page = to_markdown(report_blocks(suite, record))
    assert "weights from 0.05 to 0.2, by task, beside the cosine" in page and "weight of the reranker" in page
    assert page.count(" 0.05 |") == 1 and page.count(" 0.2 |") == len(record["tasks"]) - 1
    for one in record["tasks"]:
        one["fusion_weight"] = 0.2
    assert "weight 0.2 beside the cosine" in to_markdown(report_blocks(suite, record))


def test_without_any_score_there_is_still_a_page() -> None:
    suite = load_suite("crossmodal")
    record = record_of(suite, {"Urban1K_t2i": 0.0} if any(t.name == "Urban1K_t2i" for t in suite.tasks) else {})
    for one in record["tasks"]:
        one["score"] = one["expected"] = None
    record["averages"] = averages(suite, record["tasks"])
    assert report_blocks(suite, record)
    assert averages_table(suite, record).rows[-1][2] == "–"


def test_blocks_in_both_languages() -> None:
    blocks = [
        Heading("A & B", 1),
        Paragraph("1 < 2"),
        Points(["one", "two"]),
        Table(columns=["a", "b"], rows=[["x|y", "1.0"], ["z", "2.0"]], ours=frozenset({1})),
    ]
    assert to_markdown(blocks) == (
        "# A & B\n\n1 < 2\n\n- one\n- two\n\n| a | b |\n| --- | ---: |\n| x\\|y | 1.0 |\n| **z** | **2.0** |\n"
    )
    page = to_html("t", blocks)
    assert "<h1>A &amp; B</h1>" in page and "<p>1 &lt; 2</p>" in page and "<li>two</li>" in page
    assert '<tr class="ours"><td>z</td><td class="right">2.0</td></tr>' in page
