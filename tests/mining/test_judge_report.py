from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from quarterlight.mining.judge_report import Example, JudgeCounts, JudgedTask, write_judge_report
from quarterlight.mining.judges import Verdict
from quarterlight.records import Candidate, Item, Query

EVIL = "<script>alert(1)</script>"


def example(query: Item, target: Item, yes: float, no: float) -> Example:
    verdict = Verdict("1:2", "1:3", yes, no, "tiny")
    one = Query(qid="1:2", item=query, positives=("1:1",))
    return Example(query=one, candidate=Candidate(did="1:3", item=target), rank=4, verdict=verdict)


@pytest.fixture
def page(tmp_path: Path, picture: Any) -> str:
    examples = [
        example(Item(text=EVIL), Item(image=picture(0), text="a caption"), 2.5, -1.25),
        example(Item(image=b"no picture"), Item(text="x" * 1000), -1.0, 1.0),
        example(Item(text="?"), Item(text="!"), 0.0, 0.0),
    ]
    judged = JudgedTask(
        name=f"{EVIL}/t2i",
        instruction="Determine <b>it</b>.",
        exempt=False,
        judges=["tiny", "tiny (text)"],
        counts=JudgeCounts(yes=1, no=19_997, undecided=1, failed=1),
        failures={"status 500: '<h1>'": 1},
        examples=examples,
    )
    left_out = JudgedTask(
        name="memes/i2t",
        instruction="",
        exempt=True,
        judges=["exempt"],
        counts=JudgeCounts(),
        failures={},
        examples=[],
    )
    write_judge_report(tmp_path, "tiny", [judged, left_out])
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_counts_and_shows(page: str) -> None:
    for words in ("19,997", "1 relevant · 19,997 not relevant · 1 undecided · 1 failed", "under 0.1 %", "99.9 %"):
        assert words in page
    assert [page.count(f'<li class="pair {kind}">') for kind in ("yes", "no", "undecided")] == [1, 1, 1]
    assert "yes 2.50 · no −1.25" in page and "found at rank 4" in page
    assert page.count("data:image/webp;base64,") == 1 and "a picture that cannot be read" in page
    assert "x" * 600 + "…" in page and "x" * 601 not in page
    assert "Not judged" in page and "nothing was retrieved" in page


def test_the_page_is_whole_and_harmless(page: str) -> None:
    assert EVIL not in page and "Determine &lt;b&gt;it" in page and "<h1>'" not in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "default-src 'none'" in page
    parser = _Balance()
    parser.feed(page)
    assert parser.open == []


def test_the_record_says_the_same(page: str, tmp_path: Path) -> None:
    record = json.loads((tmp_path / "report.json").read_text())
    task = record["tasks"][f"{EVIL}/t2i"]
    assert record["judge"] == "tiny" and (task["yes"], task["no"], task["undecided"], task["failed"]) == (
        1,
        19_997,
        1,
        1,
    )
    assert [one["relevant"] for one in task["examples"]] == [True, False, None]
    assert record["tasks"]["memes/i2t"]["exempt"]


class _Balance(HTMLParser):
    """What was opened and not closed."""

    open: list[str]

    def __init__(self) -> None:
        super().__init__()
        self.open = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
