from __future__ import annotations

import csv
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
from tests.data.layouts import opened_tasks, write_suite

from quarterlight.data.benchmarks import LOADERS
from quarterlight.data.registry import datasets
from quarterlight.errors import DatasetError, InputError
from quarterlight.evaluation.reference import per_dataset, references, tables
from quarterlight.evaluation.suites import SUITES, SuiteTask, load_suite, open_task
from quarterlight.images import load_image

FIXTURES = Path(__file__).parents[1] / "fixtures"

Opened = Callable[[str], Path]


@pytest.fixture(scope="module")
def suite_data(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A directory with every dataset of a suite, written once."""
    written: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in written:
            written[name] = write_suite(name, tmp_path_factory.mktemp(name))
        return written[name]

    return write


@pytest.mark.parametrize("name", SUITES)
def test_the_fixtures_that_are_kept_are_those_that_are_written(name: str, suite_data: Opened) -> None:
    """``evaluate --suite NAME --data tests/fixtures/NAME`` runs from a clone; ``tests/data/layouts.py`` makes these."""
    kept, made = FIXTURES / name, suite_data(name)
    folders = [{str(one.relative_to(root)) for one in root.rglob("*") if one.is_file()} for root in (kept, made)]
    assert folders[0] == folders[1]
    for file in sorted(folders[0]):
        if Path(file).suffix in (".json", ".jsonl", ".csv", ".txt", ".tsv"):
            assert (kept / file).read_bytes() == (made / file).read_bytes(), file
    for one in opened_tasks(name):
        assert open_task(one, kept).queries


def task_of(suite: str, name: str) -> SuiteTask:
    return next(task for task in load_suite(suite).tasks if task.name == name)


def test_suites_have_the_tasks_that_their_papers_count() -> None:
    counts = {name: len(load_suite(name).tasks) for name in SUITES}
    assert counts == {
        "mmeb": 36,
        "mmeb-v2-image": 36,
        "visdoc": 26,  # 24, and two with the old page ids
        "crossmodal": 15,
        "mbeir-local": 16,
        "mbeir-global": 16,
        "zeroshot": 26,
        "mini": 25,
    }
    groups = [task.group for task in load_suite("mmeb").tasks]
    assert [groups.count(one) for one in ("Classification", "VQA", "Retrieval", "Grounding")] == [10, 10, 12, 4]
    assert [task.in_distribution for task in load_suite("mmeb").tasks].count("IND") == 20
    with pytest.raises(InputError, match=r"no suite 'mmbe'. Did you mean 'mmeb'"):
        load_suite("mmbe")


@pytest.mark.parametrize("name", SUITES)
def test_declarations_hold_together(name: str) -> None:
    suite = load_suite(name)
    known = {task.name for task in suite.tasks}
    assert len(known) == len(suite.tasks)
    for average in suite.averages:
        assert set(average.of) <= known and average.name not in known
        known.add(average.name)
    for task in suite.tasks:
        assert task.loader in LOADERS
        assert task.ties in ("first", "strict", "expected")
        assert (task.entry is None) == (name == "mini")
        if task.entry is not None:
            assert task.query_instruction and task.query_instruction != "-"
            assert task.entry.task in (None, task.direction)
    if suite.reference_table is not None:
        assert suite.reference_table in tables()
        for row in references(suite.reference_table):
            assert set(row.scores) <= known
    for row in per_dataset(name):
        assert set(row.scores) <= {task.name for task in suite.tasks}


def test_every_evaluation_row_of_the_registry_is_a_task() -> None:
    tasks = [task.entry for name in SUITES for task in load_suite(name).tasks]
    rows = [entry for entry in datasets() if entry.role.startswith("eval") and "(group)" not in entry.name]
    missing = [(entry.name, entry.role, entry.direction) for entry in rows if entry not in tasks]
    assert not missing


@pytest.mark.parametrize("name", SUITES)
def test_every_task_of_a_suite_opens(name: str, suite_data: Opened, tmp_path: Path) -> None:
    data = suite_data(name)
    for one in opened_tasks(name):
        task = open_task(one, data, pictures=tmp_path)
        dids = {candidate.did for candidate in task.candidates}
        assert task.queries, one.name
        for query in task.queries:
            assert query.positives and set(query.positives) <= dids
            assert set(query.candidates) <= dids and set(query.excluded) <= dids
            assert set(query.grades) <= set(query.positives)
            text = query.item.text or ""
            assert "<|image" not in text and "Represent" not in text and text == text.strip()
            if one.query_instruction:
                assert query.item.instruction == one.query_instruction
        if one.direction != "t2v" and name not in ("mini", "mbeir-global"):
            source, target = one.direction.replace("vd", "i").split("2")
            kinds = {"t": "text", "i": "image", "it": "image,text"}
            assert {query.item.modality for query in task.queries} == {kinds[source]}
            assert {candidate.item.modality for candidate in task.candidates} == {kinds[target]}
        tiles = {item.max_tiles for item in (*(q.item for q in task.queries), *(c.item for c in task.candidates))}
        assert tiles <= {None, one.max_tiles} or name == "mini"


def test_the_global_pool_of_mbeir_is_all_local_ones(suite_data: Opened) -> None:
    data = suite_data("mbeir-local")
    local, union = (open_task(load_suite(name).tasks[0], data) for name in ("mbeir-local", "mbeir-global"))
    assert (len(local.candidates), len(union.candidates)) == (3, 48)
    assert [query.positives for query in local.queries] == [query.positives for query in union.queries]
    assert local.queries[0].item.instruction == "Identify the news-related image in line with the described event."


def test_old_and_fixed_pages_are_different_datasets(suite_data: Opened) -> None:
    fixed, old = task_of("visdoc", "ViDoSeek-page-fixed"), task_of("visdoc", "ViDoSeek-page-old")
    assert (fixed.hub_id, old.hub_id) == ("VLM2Vec/ViDoSeek-page-fixed", "VLM2Vec/ViDoSeek-page")
    averages = {average.name: average.of for average in load_suite("visdoc").averages}
    assert len(averages["Overall"]) == len(averages["Overall (old page ids)"]) == 24
    assert old.name not in averages["OOD"] and fixed.name not in averages["OOD (old page ids)"]


# Rows of Table 4 that VLM2Vec has published dataset by dataset
_COPIED = {
    "GME Qwen2VL 2.2B": "gme-Qwen2-VL-2B-Instruct",
    "ColPali Paligemma 2.9B": "colpali-v1.3",
    "VLM2Vec-V2 Qwen2VL 2.2B": "VLM2Vec-V2.0-Qwen2VL-2B",
    "GME Qwen2VL 8.3B": "gme-Qwen2-VL-7B-Instruct",
    "LamRA-Qwen2 Qwen2VL 8.3B": "LamRA-Ret",
    "LamRA-Qwen2.5 Qwen2.5VL 8.3B": "LamRA-Ret-Qwen2.5VL-7b",
}


@pytest.mark.parametrize("label", _COPIED)
def test_averages_of_visdoc_are_those_of_table_4(label: str) -> None:
    printed = next(row for row in references("visdoc") if row.label == label)
    tasks = next(row for row in per_dataset("visdoc", "v2.0.0") if row.model == _COPIED[label])
    ours = load_suite("visdoc").average(tasks.scores)
    assert {name: pytest.approx(ours[name], abs=0.051) for name in printed.scores} == printed.scores
    assert ours["OOD"] is None  # the fixed pages were not scored then: nothing is averaged over fewer sets


def test_averages_of_mmeb_weigh_sets_not_groups() -> None:
    suite = load_suite("mmeb")
    for row in references("mmeb"):
        if not row.model.startswith("Magic"):
            continue  # of the copied rows, six break this in the paper itself
        scores = {task.name: row.scores[task.group] for task in suite.tasks}
        assert suite.average(scores)["Overall"] == pytest.approx(row.scores["Overall"], abs=0.1)
        halves = {task.name: row.scores[task.in_distribution] for task in suite.tasks}
        assert suite.average(halves)["Overall"] == pytest.approx(row.scores["Overall"], abs=0.1)


def test_averages_of_averages() -> None:
    suite = load_suite("zeroshot")
    scores = {task.name: 1.0 if "replace" in task.name else 0.0 for task in suite.tasks}
    assert suite.average(scores)["SugarCrepe Replace"] == 1
    assert suite.average(scores)["SugarCrepe"] == pytest.approx(1 / 3)  # of groups, not of the seven subsets


def test_a_published_mbeir_row_has_the_average_that_it_prints() -> None:
    for table in ("mbeir-local", "mbeir-global"):
        row = next(row for row in references(table) if row.label == "U-MARVEL Qwen2VL-7B")
        assert load_suite(table).average(row.scores)["Overall"] == pytest.approx(row.scores["Overall"], abs=0.1)
    with pytest.raises(InputError, match="no table 'mbeir'"):
        references("mbeir")


def test_data_that_is_not_there(suite_data: Opened, tmp_path: Path) -> None:
    arxivqa = task_of("visdoc", "ViDoRe_arxivqa")
    with pytest.raises(DatasetError, match=r"ViDoRe_arxivqa: .* has no folder mteb/arxivqa_test_subsampled_beir/"):
        open_task(arxivqa, tmp_path)
    with pytest.raises(DatasetError, match="is not a folder"):
        open_task(arxivqa, tmp_path / "none")
    with pytest.raises(DatasetError, match=r"cannot be fetched .*--data"):
        open_task(replace(arxivqa, hub_id="quarterlight-tests/not-there"), None)  # tests are offline
    with pytest.raises(DatasetError, match=r"CIRCO cannot be fetched from the Hugging Face hub.*by hand"):
        open_task(task_of("zeroshot", "CIRCO"), None)


def test_the_revision_is_noted_and_checked(suite_data: Opened, tmp_path: Path) -> None:
    arxivqa = task_of("visdoc", "ViDoRe_arxivqa")
    assert arxivqa.revision is not None and open_task(arxivqa, suite_data("visdoc")).revision is None
    shutil.copytree(suite_data("visdoc") / arxivqa.folder, tmp_path / "mteb/arxivqa_test_subsampled_beir")
    note = Path(".cache/huggingface/download/corpus/test-00000-of-00001.parquet.metadata")
    pinned = tmp_path / "mteb/arxivqa_test_subsampled_beir" / note
    pinned.parent.mkdir(parents=True)
    pinned.write_text(f"{arxivqa.revision}\netag\n1.0\n")
    assert open_task(arxivqa, tmp_path).revision == arxivqa.revision
    pinned.write_text("0" * 40 + "\netag\n1.0\n")
    with pytest.raises(DatasetError, match=rf"is revision {'0' * 40} of mteb/.*pinned to {arxivqa.revision}"):
        open_task(arxivqa, tmp_path)
    # every file that the task needs counts, not only the first that is found; others do not
    for name, commit in ((note.name, arxivqa.revision), ("README.md.metadata", "1" * 40), ("else.metadata", "2" * 40)):
        (pinned.parent / name if name == note.name else pinned.parents[1] / name).write_text(f"{commit}\netag\n1.0\n")
    with pytest.raises(DatasetError, match=rf"is revision {'1' * 40} and {arxivqa.revision} of mteb/"):
        open_task(arxivqa, tmp_path)
    (pinned.parents[1] / "README.md.metadata").unlink()
    assert open_task(arxivqa, tmp_path).revision == arxivqa.revision
    pinned.write_text("0" * 40 + "\netag\n1.0\n")
    # the repository that mteb has copied has commits of its own
    (tmp_path / "mteb").rename(tmp_path / "vidore")
    assert open_task(arxivqa, tmp_path).revision == "0" * 40


def test_the_cache_of_the_hub_is_read_at_the_pinned_revision(
    suite_data: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arxivqa = task_of("visdoc", "ViDoRe_arxivqa")
    repository = tmp_path / "datasets--mteb--arxivqa_test_subsampled_beir"
    shutil.copytree(suite_data("visdoc") / arxivqa.folder, repository / f"snapshots/{arxivqa.revision}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert open_task(arxivqa, None, pictures=tmp_path).revision == arxivqa.revision


def test_the_archive_of_mmeb_v2_is_unpacked_once(suite_data: Opened, tmp_path: Path) -> None:
    whole = suite_data("mmeb-v2-image")
    task = task_of("mmeb-v2-image", "CIRR")
    shutil.copytree(whole / "CIRR", tmp_path / "CIRR")
    archive = tmp_path / "image-tasks/mmeb_v1.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(whole / "image-tasks/CIRR", "MMEB/CIRR")
    first = open_task(task, tmp_path)
    assert first.pictures_revision is None
    note = tmp_path / ".cache/huggingface/download/image-tasks/mmeb_v1.tar.gz.metadata"
    note.parent.mkdir(parents=True)
    note.write_text("a" * 40 + "\netag\n1.0\n")
    assert open_task(task, tmp_path).pictures_revision == "a" * 40
    note.unlink()
    assert not first.problems and load_image(first.queries[0].item.images[0]).size == (8, 8)
    assert open_task(task, tmp_path) == first
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(DatasetError, match=r"mmeb_v1.tar.gz cannot be unpacked .*truncated"):
        open_task(task, tmp_path)


def test_instructions_of_mbeir_have_one_source() -> None:
    """The table of suites would be a second one; both suites ask with the first of the registry's."""
    tasks = [*load_suite("mbeir-local").tasks, *load_suite("mbeir-global").tasks]
    for task in tasks:
        assert task.entry is not None and task.query_instruction == task.entry.query_instructions[0]
    table = files("quarterlight.evaluation") / "resources" / "suites.csv"
    rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    assert not [row["name"] for row in rows if row["suite"].startswith("mbeir") and row["query_instruction"]]
