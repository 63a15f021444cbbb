"""Benchmarks of several tasks: what is in each, how its official evaluator scores it, and what it averages.

A suite is data: ``resources/suites.csv`` and ``resources/averages.csv`` beside this module name the tasks, and the
registry of datasets (:mod:`quarterlight.data.registry`) says where each lies.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias

from quarterlight.data.benchmarks import LOADERS
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.registry import DatasetEntry, datasets
from quarterlight.data.retrieval import RetrievalTask, with_instructions
from quarterlight.errors import DatasetError, InputError, did_you_mean

Ties: TypeAlias = Literal["first", "strict", "expected"]
"""What candidates of one score are worth to the official evaluator: the first in the order of the list wins, the
positive loses, or the mean over all their orders counts."""


SUITES: Mapping[str, str] = MappingProxyType(
    {
        "mmeb": "MMEB (Precision@1 over each query's own candidates)",
        "mmeb-v2-image": "MMEB-V2, image tasks",
        "visdoc": "Visual documents of MMEB-V2 (NDCG@5)",
        "crossmodal": "Pictures and captions, short, long and compositional",
        "mbeir-local": "M-BEIR, one pool for each task",
        "mbeir-global": "M-BEIR, one pool for all tasks",
        "zeroshot": "Zero-shot sets of U-MARVEL",
        "mini": "The datasets of this project",
    }
)
"""Name -> title."""


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """One line of a suite's table: a dataset, and how its scores are computed.

    A metric is one of ``precision@1``, ``hit@k``, ``recall@k``, ``ndcg@k``, ``ndcg_linear@k``, ``map@k``, ``mrr@k`` and
    ``accuracy`` (a query with two candidates, right when its positive has the strictly greater score).
    """

    name: str
    """unique in its suite: ``ImageNet-1K``, ``Flickr30K t2i``, ``M-BEIR/CIRR task7``"""
    loader: str
    """what reads its files: a key of ``quarterlight.data.benchmarks.LOADERS``"""
    metric: str
    """that the suite averages"""
    also: tuple[str, ...] = ()
    """metrics that its papers print beside"""
    ties: Ties
    group: str
    """meta-task or collection, as the papers' tables head their columns"""
    in_distribution: str
    """IND or OOD; empty where the suite makes no difference"""
    entry: DatasetEntry | None
    """in the registry; ``None`` for this project's own datasets"""
    direction: str
    """as our task names spell it: ``t2i``, ``it2t``, ``t2vd``, ``t2v``"""
    split: str
    """as the task is named; files may say otherwise, see ``options``"""
    max_tiles: int = 1
    """of its pictures: 1 for photographs, 4 for pages"""
    query_instruction: str | None = None
    """of items that have none of their own; ``None`` takes the paper's for the direction"""
    document_instruction: str | None = None
    """likewise; ``None`` keeps to the model's default for the modality"""
    readings: tuple[str, ...] = ()
    """of the official evaluator that are not followed: names in ``quarterlight.evaluation.benchmark.READINGS``"""
    hub_id: str | None = None
    """repository on the Hugging Face hub; ``None`` for what must be fetched by hand"""
    revision: str | None = None
    """commit that is pinned; ``None`` where no source names one"""
    files: tuple[str, ...] = ()
    """patterns of the files of the repository that the task needs; none for what must be fetched by hand"""
    folder: str = ""
    """below the directory of the data, where its files may lie instead of in ``hub_id``; empty for the directory"""
    options: Mapping[str, str] = field(default_factory=dict)
    """for the loader: config, file, split and the like; ``pictures`` names a repository and an archive in it"""


@dataclass(frozen=True, kw_only=True)
class Average:
    """An unweighted mean.

    of: names of tasks, and of averages that the suite lists before this one.
    """

    name: str
    of: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A benchmark.

    averages: in the order of the papers' columns.
    reference_table: of published scores to print beside ours, see :mod:`quarterlight.evaluation.reference`; its columns
        are names of tasks and averages.  ``None`` where nothing is published.
    """

    name: str
    title: str
    tasks: tuple[SuiteTask, ...]
    averages: tuple[Average, ...]
    reference_table: str | None

    def average(self, scores: Mapping[str, float]) -> dict[str, float | None]:
        """The averages of tasks' scores by name, in order; ``None`` where the score of any member is missing."""
        known: dict[str, float | None] = {}
        for one in self.averages:
            members = [known[name] if name in known else scores.get(name) for name in one.of]
            values = [value for value in members if value is not None]
            known[one.name] = sum(values) / len(values) if values and len(values) == len(members) else None
        return known


@cache
def load_suite(name: str) -> Suite:
    """The suite of a name.  Raises InputError, with the nearest name, when there is none.

    >>> load_suite("mmeb").average({task.name: 0.5 for task in load_suite("mmeb").tasks})["Overall"]
    0.5
    """
    if name not in SUITES:
        raise InputError(f"There is no suite {name!r}. {did_you_mean(name, SUITES)}")
    return Suite(
        name=name,
        title=SUITES[name],
        tasks=tuple(_task(row) for row in _rows("suites.csv") if row["suite"] == name),
        averages=tuple(
            Average(name=row["name"], of=tuple(row["of"].split("|")))
            for row in _rows("averages.csv")
            if row["suite"] == name
        ),
        reference_table=_REFERENCES.get(name),
    )


def open_task(
    task: SuiteTask, data: str | os.PathLike[str] | None, *, pictures: str | os.PathLike[str] | None = None
) -> RetrievalTask:
    """Reads a task, with the instructions of its suite in its items.

    data: directory of the suite's datasets, each as it is published, in a folder named as its repository or as
        ``task.folder``; ``None`` fetches what is missing from the Hugging Face hub, at the pinned revision.
    pictures: where pictures that lie in tables are kept as files; by default in the hub's cache of assets.
    Raises DatasetError, with what to do, for data that is missing, offline, of another revision or breaks its layout.
    """
    folder = _download(task) if data is None else _local(task, Path(data))
    revision = _revision(folder, task.files)
    if task.revision and revision and revision != task.revision and _is_pinned_repository(task, folder):
        raise DatasetError(
            f"{task.name}: {folder} is revision {revision} of {task.hub_id}, the suite is pinned to {task.revision}: "
            "fetch that one, or scores cannot be compared."
        )
    options = dict(task.options)
    pictures_revision = None
    if archive := options.pop("pictures", None):
        packed = _packed_pictures(task, folder, archive, offline=data is not None)
        options["unpacked"] = str(folder if packed is None else _unpacked(packed))
        if packed is not None:
            pictures_revision = _revision(packed.parent) or _revision(folder, (archive.partition(":")[2],))
    source = Source(
        dataset=task.name,
        task=task.direction,
        split=task.split,
        folder=folder,
        options=options,
        max_tiles=task.max_tiles,
        pictures=Path(pictures) if pictures else _assets("pictures"),
        revision=revision,
    )
    opened = replace(LOADERS[task.loader](source), pictures_revision=pictures_revision)
    return with_instructions(opened, query=task.query_instruction, document=task.document_instruction)


def _task(row: Mapping[str, str]) -> SuiteTask:
    entry = _entry(row)
    _, document = (entry.instructions if entry else None) or (None, None)
    query = next(iter(entry.query_instructions), None) if entry else None
    return SuiteTask(
        name=row["name"],
        loader=row["loader"],
        metric=row["metric"],
        also=_several(row["also"]),
        ties=row["ties"],  # type: ignore[arg-type]
        group=row["group"],
        in_distribution=row["in_distribution"],
        entry=entry,
        direction=row["direction"],
        split=row["split"],
        max_tiles=int(row["max_tiles"] or 1),
        query_instruction=row["query_instruction"] or query,
        document_instruction=row["document_instruction"] or document,
        readings=_several(row["readings"]),
        hub_id=row["hub_id"] or None,
        revision=row["revision"] or None,
        files=_several(row["files"]),
        folder=row["folder"],
        options=MappingProxyType(dict(option.split("=", 1) for option in _several(row["options"]))),
    )


def _entry(row: Mapping[str, str]) -> DatasetEntry | None:
    """The entry of the registry that a task is; of M-BEIR's two, which differ in the pool, the one of the suite."""
    if not row["dataset"]:
        return None
    found = [
        entry
        for entry in datasets(row["role"])  # type: ignore[arg-type]
        if entry.name == row["dataset"] and (entry.task or row["direction"]) == row["direction"]
    ]
    return found[-1] if row["suite"] == "mbeir-global" else found[0]


def _several(cell: str) -> tuple[str, ...]:
    return tuple(cell.split("|")) if cell else ()


@cache
def _rows(name: str) -> list[dict[str, str]]:
    text = (files("quarterlight.evaluation") / "resources" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _local(task: SuiteTask, data: Path) -> Path:
    names = [task.hub_id, task.hub_id.rpartition("/")[2]] if task.hub_id else []
    names += [task.entry.hub_id] if task.entry else []  # where the suite is pinned to a copy of it
    names += [task.folder] if task.folder else []
    for name in names:
        if (data / name).is_dir():
            return data / name
    if not task.folder and data.is_dir():
        return data
    if not data.is_dir():
        raise DatasetError(f"{data} is not a folder.")
    wanted = " or ".join(f"{name}/" for name in dict.fromkeys(names) if " " not in name)
    raise DatasetError(f"{task.name}: {data} has no folder {wanted} with the files of this dataset.")


def _download(task: SuiteTask) -> Path:
    """The folder of the hub's cache with the files of a task."""
    if task.hub_id is None or not task.files:
        raise DatasetError(
            f"{task.name} cannot be fetched from the Hugging Face hub as it is needed: fetch it by hand, lay it out as "
            f"docs/benchmarks.md says for the loader {task.loader!r}, and name the directory with --data."
        )
    return _snapshot(task.name, task.hub_id, task.revision, task.files)


def _snapshot(name: str, hub_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = snapshot_download(hub_id, repo_type="dataset", revision=revision, allow_patterns=list(patterns))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
        raise DatasetError(
            f"{name}: {hub_id} is not in the hub's cache and cannot be fetched ({type(error).__name__}): go online, or "
            "name a directory that has it with --data."
        ) from error
    return Path(folder)


def _revision(folder: Path, patterns: Sequence[str] = ("*",)) -> str | None:
    """The commit of the files in a folder that fit the patterns, as the hub's library notes it for each; all of them
    where files are of several, ``None`` where nothing is noted.
    """
    for part in (folder, *folder.absolute().parents):
        if part.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", part.name):
            return part.name
    notes = folder / ".cache" / "huggingface" / "download"
    found = set()
    for note in notes.rglob("*.metadata"):
        name = note.relative_to(notes).as_posix().removesuffix(".metadata")
        if any(fnmatch(name, pattern) for pattern in patterns or ("*",)):
            commit = note.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
            found |= {commit} if re.fullmatch(r"[0-9a-f]{40}", commit) else set()
    return " and ".join(sorted(found)) or None


def _is_pinned_repository(task: SuiteTask, folder: Path) -> bool:
    """Whether a folder can only be of the repository that is pinned, and not of the one that it is a copy of."""
    copied = task.entry is not None and task.entry.hub_id != task.hub_id
    return not copied or folder.as_posix().endswith(f"/{task.hub_id}") or folder.parent.name == "snapshots"


def _assets(namespace: str) -> Path:
    from huggingface_hub import cached_assets_path

    return Path(cached_assets_path("quarterlight", namespace=namespace))


def _packed_pictures(task: SuiteTask, folder: Path, archive: str, *, offline: bool) -> Path | None:
    """An archive of pictures: beside the tables, or from the hub; ``None`` for what was unpacked there by hand.

    archive: repository and path, divided by a colon.
    """
    hub_id, _, path = archive.partition(":")
    packed = folder / path
    if packed.is_file():
        return packed
    return None if offline else _snapshot(task.name, hub_id, None, (path,)) / path


def _unpacked(packed: Path) -> Path:
    """The folder in the cache of assets with the files of an archive."""
    real = packed.resolve()
    key = hashlib.sha256(f"{real} {real.stat().st_size} {real.stat().st_mtime_ns}".encode()).hexdigest()[:16]
    target = _assets("archives") / key
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=target.parent))
        try:
            with tarfile.open(real) as file:
                file.extractall(draft, filter="data")
            draft.rename(target)
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            shutil.rmtree(draft, ignore_errors=True)
            if not target.is_dir():  # which another process may have made meanwhile
                raise DatasetError(f"the archive {packed} cannot be unpacked ({error}): is it truncated?") from error
    return target


_REFERENCES = {
    "mmeb": "mmeb",
    "mmeb-v2-image": "mmeb",
    "visdoc": "visdoc",
    "crossmodal": "crossmodal",
    "mbeir-local": "mbeir-local",
    "mbeir-global": "mbeir-global",
    "zeroshot": "zeroshot",
}
