from __future__ import annotations

from collections import Counter

import pytest

from quarterlight.data.registry import datasets, find
from quarterlight.errors import InputError
from quarterlight.prompts import QUERY_INSTRUCTIONS


def test_every_role_has_its_datasets() -> None:
    counts = Counter(entry.role for entry in datasets())
    assert counts["eval-mmeb"] == 36 and counts["eval-visdoc"] == 24  # as the benchmarks are known
    assert counts["train-stage1"] == 27  # 26 in Table 1, three of them in-house, and one of U-MARVEL
    for role, count in counts.items():
        assert len(datasets(role)) == count
    assert [entry.name for entry in datasets("train-stage1") if entry.name.startswith("In-house")] == [
        "In-house captioning",
        "In-house grounding",
        "In-house classification",
    ]


def test_every_entry_says_where_its_facts_come_from() -> None:
    assert all(entry.source_of_fact and entry.direction and entry.hub_id for entry in datasets())


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("MMEB-train/CIRR", 26_116),
        ("MMEB-train/NIGHTS", 15_900),  # ~15900
        ("Docmatix", 1_270_000),  # 1.27M rows (documents)
        ("MegaPairs", 26_000_000),  # >26M triplets available
        ("mmE5-synthetic", 560_000),  # 560000 rows over all three configs
        ("M-BEIR/OVEN task8", 154_460),  # 154460 or 157K (sources differ)
        ("Infinity-MM", None),  # unknown
    ],
)
def test_size_reads_what_the_sources_say(name: str, size: int | None) -> None:
    train = [entry for entry in find(name) if entry.role.startswith("train")]
    assert {entry.size for entry in train} == {size}


def test_directions_are_spelt_as_our_tasks() -> None:
    assert [entry.task for entry in find("Docmatix")] == ["t2vd", "it2t"]
    assert [entry.task for entry in find("Infinity-MM")] == [None]
    assert {entry.task for entry in datasets("train-stage2")} <= {*QUERY_INSTRUCTIONS, None}


def test_instructions_are_those_of_the_paper() -> None:
    def instructions(name: str, task: str) -> tuple[str | None, str] | None:
        return next(entry.instructions for entry in find(name) if entry.task == task)

    cirr = instructions("MMEB-train/CIRR", "it2i")
    assert cirr == (
        "Given an image, find a similar everyday image with the described changes as the given query.",
        "Represent the given image.",
    )
    assert instructions("mmE5-synthetic", "t2i") == (None, "Represent the given image.")
    for task, name in {"t2t": "BAAI-MTP", "t2vd": "ColPali train set", "it2t": "MMEB-train/InfographicsVQA"}.items():
        found = instructions(name, task)
        assert found is not None and found[0] == QUERY_INSTRUCTIONS[task]
    assert instructions("MMEB-train/VisualNews_t2i", "t2i") == (
        "Retrieve an image of the given query.",
        "Represent the given image.",
    )
    assert instructions("mmE5-synthetic", "it2it") is None  # in Table 2, but not in Table 12
    lacking = {entry.name for entry in datasets("train-stage2") if entry.instructions is None}
    assert lacking == {"mmE5-synthetic", "CC3M (LLaVA 595K subset)"}  # the second is U-MARVEL's


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no 'Megapair'. Did you mean 'MegaPairs'"):
        find("Megapair")
    with pytest.raises(InputError, match=r"MMEB-train/ChartQa.*Did you mean.*'MMEB-train/ChartQA'"):
        find("MMEB-train/ChartQa")
    with pytest.raises(InputError) as error:
        find("nothing like it")
    assert len(str(error.value)) < 200
    with pytest.raises(InputError, match=r"no role 'train-stage4'.*Did you mean"):
        datasets("train-stage4")  # type: ignore[arg-type]


def test_tasks_of_m_beir_have_several_instructions() -> None:
    parts = [entry for entry in datasets("eval-mbeir") if " task" in entry.name]
    assert len({entry.name for entry in parts}) == 16
    assert {len(entry.query_instructions) for entry in parts} == {3, 4}
    assert {entry.name for entry in parts if len(entry.query_instructions) == 3} == {"M-BEIR/InfoSeek task8"}
    assert all(one.endswith((".", "?")) for entry in parts for one in entry.query_instructions)
    (cirr,) = {entry.query_instructions for entry in find("M-BEIR/CIRR task7")}
    assert (
        cirr[0] == "Retrieve a day-to-day image that aligns with the modification instructions of the provided image."
    )
    usual = next(entry for entry in find("MMEB-train/CIRR"))
    assert usual.instructions is not None and usual.query_instructions == (usual.instructions[0],)
