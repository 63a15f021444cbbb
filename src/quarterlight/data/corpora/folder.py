"""Examples written as a retrieval dataset that recipes can name, row by row: what is written is not kept in memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from quarterlight.data.corpora import CORPORA, INSTRUCTIONS
from quarterlight.data.corpora.example import Corpus, Example, Part
from quarterlight.data.retrieval import write_instructions
from quarterlight.errors import DatasetError, InputError, did_you_mean
from quarterlight.files import replacing
from quarterlight.records import ArchiveMember, ImageSource

_BUCKETS = 256  # files that the pool is sorted into, so that only one at a time is searched for repetitions


@dataclass(kw_only=True)
class FolderCounts:
    """What became of the rows of a corpus."""

    read: int = 0
    queries: int = 0
    candidates: int = 0
    """distinct by what they show"""
    other: int = 0
    """left out: rows of another direction than the task's"""
    problems: list[str] = field(default_factory=list)
    """a sentence for each row that could not be used, with file and row"""


def write_folder(corpus: Corpus, layout: str, out: Path, *, on_row: Callable[[], None] = lambda: None) -> FolderCounts:
    """Writes ``queries/<task>.<split>.jsonl`` and ``pools/<task>.<split>.jsonl`` below ``out``, and the task's
    instructions to ``instructions.json`` where the corpus has any.

    Ids of candidates are hashes of what they show, so that what occurs in many rows is one candidate.  Pictures stay
    where they are: ``out`` gets a link ``images`` to their folder, or ``images.zip`` to their archive; those that lie
    inside tables are written to ``images/``, once for each content.
    Raises InputError for an unknown layout, DatasetError when no row can be used or pictures lie in two places.
    """
    if layout not in CORPORA:
        raise InputError(f"There is no layout {layout!r} of training data. {did_you_mean(layout, CORPORA)}")
    counts = FolderCounts()
    pictures = _Pictures(out, corpus.images or corpus.folder)
    wanted = corpus.task.replace("vd", "i")
    name = f"{corpus.task}.{corpus.split}.jsonl"
    try:
        with _whole(out / "queries" / name) as queries, _whole(out / "pools" / name) as pool, _Pool(out) as sorted_pool:
            for example in CORPORA[layout](corpus):
                on_row()
                counts.read += 1
                if isinstance(example, DatasetError):
                    counts.problems.append(str(example))
                    continue
                if problem := _problem(example):
                    counts.problems.append(f"{example.place}: {problem}.")
                    continue
                if any(f"{example.query.kind}2{part.kind}" != wanted for part in example.positives):
                    counts.other += 1
                    continue
                positives = [sorted_pool.add(pictures.row(part)) for part in example.positives]
                negatives = [sorted_pool.add(pictures.row(part)) for part in example.negatives if part.kind]
                text, path = pictures.row(example.query)
                counts.queries += 1
                row = {
                    "qid": str(counts.queries),
                    "query_txt": text,
                    "query_img_path": path,
                    "pos_cand_list": list(dict.fromkeys(positives)),
                    "neg_cand_list": [did for did in dict.fromkeys(negatives) if did not in positives],
                }
                queries.write(json.dumps(row, ensure_ascii=False) + "\n")
            if not counts.queries:
                first = f" The first problem: {counts.problems[0]}" if counts.problems else ""
                others = f" {counts.other} rows are of another direction than {corpus.task}." if counts.other else ""
                raise DatasetError(f"{corpus.path} has no row that can be used in the layout {layout}.{others}{first}")
            for line in sorted_pool.distinct():
                counts.candidates += 1
                pool.write(line)
        if instructions := INSTRUCTIONS.get(layout, lambda _: ())(corpus):
            write_instructions(out, corpus.task, instructions)
    except OSError as error:
        raise DatasetError(f"{out} cannot be written ({error.strerror or error}).") from error
    return counts


def _problem(example: Example) -> str | None:
    if not example.query.kind:
        return "the query has neither text nor picture"
    if not example.positives:
        return "the query has no positive candidate"
    if not all(part.kind for part in example.positives):
        return "a positive has neither text nor picture"
    return None


@contextmanager
def _whole(path: Path) -> Iterator[IO[str]]:
    """A file that has its name only when it is whole."""
    with replacing(path) as draft, draft.open("w", encoding="utf-8") as file:
        yield file


class _Pool:
    """Candidates sorted into files by their ids, so that repetitions stand in one file."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._stack = ExitStack()

    def __enter__(self) -> _Pool:
        self._folder = Path(tempfile.mkdtemp(prefix=".pool.", dir=self._out))
        self._files = [
            self._stack.enter_context((self._folder / f"{number:02x}").open("w+", encoding="utf-8"))
            for number in range(_BUCKETS)
        ]
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, row: tuple[str | None, Any]) -> str:
        """The id of a candidate, which is written down."""
        text, path = row
        did = hashlib.sha256(json.dumps([text, path]).encode()).hexdigest()[:20]
        line = json.dumps({"did": did, "txt": text, "img_path": path}, ensure_ascii=False)
        self._files[int(did[:2], 16)].write(line + "\n")
        return did

    def distinct(self) -> Iterator[str]:
        """The lines of all candidates, each once."""
        for file in self._files:
            file.seek(0)
            yield from dict.fromkeys(file)


class _Pictures:
    """Pictures as rows of the folder name them: all in one place, which is ``images`` or ``images.zip``."""

    def __init__(self, out: Path, images: Path) -> None:
        self.out = out
        self.images = images
        self._place: Path | None = None

    def row(self, part: Part) -> tuple[str | None, str | list[str] | None]:
        """Text and path, or paths, of a part."""
        paths = [self._path(picture) for picture in part.pictures]
        path: str | list[str] | None = paths if len(paths) > 1 else paths[0] if paths else None
        return (part.text if part.text.strip() else None), path

    def _path(self, picture: ImageSource) -> str:
        if isinstance(picture, bytes):
            name = hashlib.sha256(picture).hexdigest()
            self._settle(self.out / "images", None)
            path = self.out / "images" / name[:2] / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture)
            return f"{name[:2]}/{name}"
        if isinstance(picture, ArchiveMember):
            self._settle(self.out / "images.zip", Path(picture.archive))
            return picture.member
        path = Path(os.fspath(picture))  # type: ignore[arg-type]
        # the folder of a config may be named, whose pictures lie beside it
        root = next((one for one in (self.images, self.images.parent) if path.is_relative_to(one)), path.parent)
        self._settle(self.out / "images", root)
        return path.relative_to(root).as_posix()

    def _settle(self, link: Path, target: Path | None) -> None:
        """Makes the link to where the pictures are when the first is met; without a target, the folder is our own."""
        place = link if target is None else target
        if self._place == place:
            return
        other = link.with_name("images" if link.suffix else "images.zip")
        taken = link.is_symlink() if target is None else link.exists() and not link.samefile(target)
        if self._place is not None or taken or other.exists():
            raise DatasetError(
                f"{self.out} would have pictures in {place} and in {self._place or (link if taken else other)}, but it "
                "can have one place for all: choose another folder, or unpack archives into one."
            )
        if target is not None and not link.exists():
            link.symlink_to(target.absolute())
        self._place = place
