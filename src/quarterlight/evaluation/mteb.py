"""Our models as models of mteb, and our retrieval datasets as its tasks; needs the extra ``eval``.

    import mteb
    mteb.evaluate(MtebEmbedder(Embedder("nano")), mteb.get_benchmark("ViDoRe(v1)"))

**Instructions.**  A query gets, from the first of these that has one: ``instructions`` by the name of the task; the row
itself; the task's metadata (``prompt``); the paper's for the task's direction (``t2i``, of pages ``t2vd``); what the
checkpoint has for the query's modality.  A document gets that of the metadata, else the checkpoint's for its modality.
Inputs that are neither (classification, similarity of sentences) are embedded as documents.

**Tiles.**  Pictures of tasks about document pages get 4 tiles and a thumbnail, others one (Magic-MM-Embedding, section
5.2).  Such tasks are those of mteb's type DocumentUnderstanding (ViDoRe, MMLongBench-Doc, ...) and VisRAG's.

**Results** are kept by mteb under the name and the revision of a model.  The revision is the hash of the weights and of
all else that changes an embedding, so a model that was trained further never gets the scores of what it was before.

**Ties.**  mteb puts candidates of equal scores in the order of their ids, :mod:`quarterlight.metrics.ranking` takes the
mean over all orders; where no scores tie, both give the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import numpy.typing as npt
from mteb import TaskMetadata
from mteb.abstasks import AbsTaskRetrieval
from mteb.models import ModelMeta
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType
from PIL import Image
from tqdm.auto import tqdm

from quarterlight.data.retrieval import (
    PAGE_MAX_TILES,
    PAGE_TASK,
    PICTURE_MAX_TILES,
    RetrievalTask,
    find_datasets,
    with_instructions,
)
from quarterlight.errors import DatasetError, ImageError, InputError
from quarterlight.images import image_bytes, load_image
from quarterlight.models.embedder import Embedder
from quarterlight.models.reranker import Reranker
from quarterlight.prompts import QUERY_INSTRUCTIONS, query_instruction
from quarterlight.records import Candidate, ImageSource, Item, Problem, Query

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

MAX_PIXELS_HELD = 1 << 26
"""Pixels of decoded pictures (3 bytes each) that are gathered before the model runs on them."""

MAX_ITEMS_HELD = 2048
"""Inputs that are, likewise: enough to sort them by length."""

_log = logging.getLogger(__name__)


class MtebModel:
    """What an embedder and a reranker have in common as models of mteb.

    mteb_model_meta: name, revision and more, by which mteb keeps results.
    """

    def __init__(
        self,
        name: str,
        model_hash: str,
        instructions: Mapping[str, str] | None,
        page_tasks: Collection[str],
        **meta: Any,
    ) -> None:
        self._instructions = dict(instructions or {})
        self._page_tasks = frozenset(page_tasks)
        settings = json.dumps([sorted(self._instructions.items()), sorted(self._page_tasks)])
        changed = self._instructions or self._page_tasks  # whose results are kept apart from those by the rules above
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": _model_name(name),
                "revision": model_hash,
                "framework": ["PyTorch", "Transformers"],
                "modalities": ["text", "image"],
                "use_instructions": True,
                "experiment_kwargs": {"prompts": hashlib.sha256(settings.encode()).hexdigest()[:16]}
                if changed
                else None,
                **meta,
            }
        )

    def query_instruction(self, task: TaskMetadata, given: str | None = None) -> str | None:
        """The instruction of a task's queries, by the rule at the top; ``None`` leaves it to the checkpoint.

        given: what the row itself says.
        """
        if instruction := self._instructions.get(task.name) or given or _prompt(task, "query"):
            return instruction
        direction = PAGE_TASK if task.category == "t2i" and self.max_tiles(task) > 1 else task.category
        return query_instruction(direction) if direction in QUERY_INSTRUCTIONS else None

    def max_tiles(self, task: TaskMetadata) -> int:
        """The most tiles of a picture of a task."""
        pages = task.type == "DocumentUnderstanding" or task.name.startswith("VisRAG") or task.name in self._page_tasks
        return PAGE_MAX_TILES if pages else PICTURE_MAX_TILES

    def _items(self, batch: Mapping[str, Any], task: TaskMetadata, side: str | None) -> list[Item | None]:
        """The items of a batch, in order; ``None`` for one with neither text nor picture."""
        items: list[Item | None] = []
        # mteb appends a query's own instruction to its text, and keeps the words alone as "query"
        words = "query" if side == "query" and "instruction" in batch and "query" in batch else "text"
        for row in range(len(next(iter(batch.values())))):
            text, picture = _cell(batch, words, row), _cell(batch, "image", row)
            if picture is None and not (text and text.strip()):
                items.append(None)
                continue
            if side == "query":
                instruction = self.query_instruction(task, _cell(batch, "instruction", row))
            else:
                instruction = _prompt(task, side or "document")
            tiles = None if picture is None else self.max_tiles(task)
            items.append(Item(text=text, image=picture, instruction=instruction, max_tiles=tiles))
        return items


class MtebEmbedder(MtebModel):
    """An :class:`quarterlight.Embedder` as an encoder of mteb.

    instructions: name of a task -> what its queries are told instead.
    page_tasks: names of further tasks whose pictures are document pages.
    """

    def __init__(
        self, embedder: Embedder, *, instructions: Mapping[str, str] | None = None, page_tasks: Collection[str] = ()
    ) -> None:
        super().__init__(
            embedder.name,
            embedder.model_hash,
            instructions,
            page_tasks,
            embed_dim=embedder.dimension,
            similarity_fn_name=ScoringFunction.COSINE,
            model_type=["dense"],
            n_parameters=sum(weight.numel() for weight in embedder.model.parameters()),
        )
        self.embedder = embedder

    def encode(
        self,
        inputs: DataLoader[Any],
        *,
        task_metadata: TaskMetadata,
        prompt_type: PromptType | None = None,
        precision: str | None = None,
        show_progress_bar: bool = False,
        **others: Any,
    ) -> npt.NDArray[np.float32]:
        """Embeddings of all inputs, float32 [N, D], rows of norm 1; of an input without any content, of norm 0.

        others: which split and subset it is, and the size of a batch, which the embedder sees to itself.
        Raises InputError for a precision other than float32, under whose name mteb would keep the results.
        """
        if precision not in (None, "float32"):
            raise InputError(f"Embeddings for mteb are float32, got precision={precision!r}: leave it out.")
        side = None if prompt_type is None else prompt_type.value
        encode = self.embedder.encode_query if side == "query" else self.embedder.encode_document
        bar = tqdm(inputs, desc=f"embed {side or 'inputs'}", unit="batch", disable=not show_progress_bar)
        blocks = []
        for items in _held(self._items(batch, task_metadata, side) for batch in bar):
            vector_ND = np.zeros((len(items), self.embedder.dimension), np.float32)
            if rows := _filled(items, f"{task_metadata.name}, {side or 'inputs'}"):
                vector_ND[rows] = encode([item for item in items if item is not None])
            blocks.append(vector_ND)
        return np.concatenate([np.empty((0, self.embedder.dimension), np.float32), *blocks])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> npt.NDArray[np.float32]:
        """Cosine of each of the first with each of the second, float32 [N1, N2]."""
        return self.embedder.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> npt.NDArray[np.float32]:
        """Cosine of rows at the same place, float32 [N]."""
        return np.einsum("nd,nd->n", *(np.asarray(one, np.float32) for one in (embeddings1, embeddings2)))


class MtebReranker(MtebModel):
    """A :class:`quarterlight.models.reranker.Reranker` as a cross-encoder of mteb; arguments as of the embedder's."""

    def __init__(
        self, reranker: Reranker, *, instructions: Mapping[str, str] | None = None, page_tasks: Collection[str] = ()
    ) -> None:
        super().__init__(
            reranker.name,
            reranker.model_hash,
            instructions,
            page_tasks,
            model_type=["cross-encoder"],
            n_parameters=sum(weight.numel() for weight in reranker.model.parameters()),
        )
        self.reranker = reranker

    def predict(
        self,
        inputs1: DataLoader[Any],
        inputs2: DataLoader[Any],
        *,
        task_metadata: TaskMetadata,
        show_progress_bar: bool = False,
        **others: Any,
    ) -> npt.NDArray[np.float32]:
        """How likely each document (of ``inputs2``) meets the query beside it, float32 [N] in [0, 1]; 0 where either
        has no content."""
        bar = tqdm(
            zip(inputs1, inputs2, strict=True),
            total=len(inputs1),
            desc="rerank",
            unit="batch",
            disable=not show_progress_bar,
        )
        scores = [np.empty(0, np.float32)]
        for pairs in _held(self._pairs(bar, task_metadata)):
            score_N = np.zeros(len(pairs), np.float32)
            if rows := _filled(pairs, f"{task_metadata.name}, pairs"):
                score_N[rows] = self.reranker.predict([pair for pair in pairs if pair is not None])
            scores.append(score_N)
        return np.concatenate(scores)

    def _pairs(
        self, batches: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]], task: TaskMetadata
    ) -> Iterator[list[tuple[Item, Item] | None]]:
        """The pairs of each batch.  What a row has read twice in a batch is the same item, to be looked at once."""
        for sides in batches:
            columns = []
            for side, batch in zip(("query", "document"), sides, strict=True):
                items = self._items(batch, task, side)
                ids = batch.get("id", range(len(items)))
                first = dict(reversed([*zip(ids, items, strict=True)]))
                columns.append([first[one] for one in ids])
            yield [None if a is None or b is None else (a, b) for a, b in zip(*columns, strict=True)]


class OfflineTask(AbsTaskRetrieval):
    """A retrieval task of ours as one of mteb, scored without a network.

    Its scores have those of :data:`quarterlight.metrics.ranking.METRICS` that mteb works out too under our names and
    unrounded (``precision@1``, ``hit@5``, ``hit@10``, ``recall@10``, ``ndcg@5``), beside mteb's own, which are rounded.
    ``num_queries`` is how many the task has, ``num_scored_queries`` how many of them have a part in the means.

    prepare: gives the task's items their instructions; by default those of the paper, by direction.
    problems: what was left out, once loaded: unreadable pictures, and queries none of whose positives can be read.
    Raises DatasetError for a task whose documents have several instructions, for which mteb has no place.
    """

    def __init__(
        self,
        task: RetrievalTask,
        *,
        prepare: Callable[[RetrievalTask], RetrievalTask] = with_instructions,
        seed: int = 42,
    ) -> None:
        self.task = prepare(task)
        self.problems: tuple[Problem, ...] = ()
        self.metadata = _metadata(self.task)
        super().__init__(seed=seed)

    def load_data(self, num_proc: int | None = None, **others: Any) -> None:
        """Reads all pictures; those that cannot be read are left out and named in ``problems``."""
        if self.data_loaded:
            return
        problems: list[Problem] = []
        files: dict[Hashable, bytes | ImageError] = {}
        candidates = [one for one in self.task.candidates if _readable(one.did, one.item, files, problems)]
        known = {one.did for one in candidates}
        queries, relevant = [], {}
        for query in self.task.queries:
            if not _readable(query.qid, query.item, files, problems):
                continue
            grades = {did: query.grades.get(did, 1) for did in query.positives if did in known}
            if grades:
                queries.append(query)
                relevant[query.qid] = grades
            else:
                problems.append(Problem(query.qid, "none of its positives can be read"))
        self.problems = tuple(problems)
        if problems:
            _log.warning("%s: %d queries and candidates are left out.", self.task.label, len(problems))
        self.dataset = {
            "default": {
                self.task.split: {
                    "corpus": _rows([(one.did, one.item) for one in candidates], files),
                    "queries": _rows([(one.qid, one.item) for one in queries], files, _own_instructions(self.task)),
                    "relevant_docs": relevant,
                    "top_ranked": _own_candidates(queries, candidates),
                }
            }
        }
        self.data_loaded = True

    def unload_data(self) -> None:
        """Lets go of the pictures.  (mteb's own would also let go of the metadata, which it takes for the class's.)"""
        self.dataset, self.data_loaded = {}, False

    def task_specific_scores(self, scores: Mapping[str, Mapping[str, float]], *others: Any, **more: Any) -> Any:
        """Ours, from those of each query."""
        return {
            **{name: float(np.mean([one[theirs] for one in scores.values()])) for name, theirs in _METRICS.items()},
            "num_queries": len(self.task.queries),
            "num_scored_queries": len(scores),
        }


_METRICS = {
    "precision@1": "success_1",
    "hit@5": "success_5",
    "hit@10": "success_10",
    "recall@10": "recall_10",
    "ndcg@5": "ndcg_cut_5",
}
"""Our names of metrics -> those of trec_eval, which mteb works with."""


def offline_tasks(
    folder: str | os.PathLike[str],
    *,
    split: str = "test",
    tasks: Sequence[str] | None = None,
    prepare: Callable[[RetrievalTask], RetrievalTask] = with_instructions,
) -> list[OfflineTask]:
    """The tasks of a retrieval dataset, or of all datasets inside a folder, for ``mteb.evaluate``.

    tasks: directions to take; ``None`` takes all.  A task is named after dataset, direction, split and what its files
    hold, so that scores on other data never pass for scores on these.
    Raises DatasetError when nothing in the folder has the split and one of the tasks.
    """
    found = []
    for dataset in find_datasets(folder):
        for name in dataset.tasks(split):
            if tasks is None or name in tasks:
                task = replace(dataset.load(name, split), revision=dataset.fingerprint(name, split))
                found.append(OfflineTask(task, prepare=prepare))
    if not found:
        wanted = "" if tasks is None else f" of the tasks {', '.join(tasks)}"
        raise DatasetError(f"{os.fspath(folder)} has no split {split!r}{wanted}: see the files in queries/.")
    return found


def _model_name(name: str) -> str:
    """``organisation/model``, as mteb wants it: a hub id as it is, the last part of a path as one of ours."""
    parts = name.rstrip("/").split("/")
    if len(parts) == 2 and all(parts) and not Path(name).is_dir():
        return name
    return f"quarterlight/{parts[-1]}"


def _prompt(task: TaskMetadata, side: str) -> str | None:
    """The instruction that a task's metadata has for queries or documents; one for both is that of queries."""
    if isinstance(task.prompt, Mapping):
        return str(task.prompt.get(side) or "") or None
    return task.prompt if side == "query" and task.prompt else None


def _cell(batch: Mapping[str, Any], column: str, row: int) -> Any:
    """A value of a batch, ``None`` for an empty one."""
    value = batch[column][row] if column in batch else None
    return None if isinstance(value, (str, list)) and not value else value


def _held(batches: Iterable[list[Any]]) -> Iterator[list[Any]]:
    """Batches put together, up to the limits at the top."""
    held: list[Any] = []
    pixels = 0
    for batch in batches:
        held += batch
        for one in batch:
            items = () if one is None else one if isinstance(one, tuple) else (one,)
            pixels += sum(picture.width * picture.height for item in items for picture in item.images)
        if pixels >= MAX_PIXELS_HELD or len(held) >= MAX_ITEMS_HELD:
            yield held
            held, pixels = [], 0
    if held:
        yield held


def _filled(items: Sequence[Any], where: str) -> list[int]:
    """The places of items that have a content; how many have none is logged."""
    rows = [row for row, item in enumerate(items) if item is not None]
    if len(rows) < len(items):
        _log.warning(
            "%s: %d of %d have neither text nor picture; their score is 0.", where, len(items) - len(rows), len(items)
        )
    return rows


def _metadata(task: RetrievalTask) -> TaskMetadata:
    queries, candidates = [one.item for one in task.queries], [one.item for one in task.candidates]
    if not queries or not candidates:
        raise DatasetError(f"{task.label} has no queries or no candidates: there is nothing to score.")
    asked, said = ({item.instruction for item in items} for items in (queries, candidates))
    if len(said) > 1:
        raise DatasetError(f"{task.label}: its documents have {len(said)} instructions; mteb has a place for one.")
    sides = {"query": asked.pop() if len(asked) == 1 else None, "document": said.pop()}
    prompt: Any = {side: words for side, words in sides.items() if words} or None
    category: Any = f"{_modalities(queries)}2{_modalities(candidates)}"
    pages = any((item.max_tiles or 1) > 1 for item in chain(queries, candidates))
    revision = task.revision or "unknown"
    return TaskMetadata(
        name=".".join([task.dataset, task.task, task.split, *[revision[:12]] * (task.revision is not None)]),
        description=f"{task.label}, in the layout of M-BEIR, from a folder.",
        dataset={"path": task.dataset, "revision": revision},
        type="DocumentUnderstanding" if pages else "Retrieval" if category == "t2t" else "Any2AnyRetrieval",
        category=category,
        modalities=["text"] if category == "t2t" else ["image", "text"] if "t" in category else ["image"],
        eval_splits=[task.split],
        eval_langs=["und-Zyyy"],
        main_score="ndcg@5" if pages else "precision@1",  # what the paper reports
        prompt=prompt,
    )


def _modalities(items: Sequence[Item]) -> str:
    """``t``, ``i`` or ``it``: all that any of the items has."""
    found = {modality for item in items for modality in item.modality.split(",")}
    return "i" * ("image" in found) + "t" * ("text" in found)


def _readable(name: str, item: Item, files: dict[Hashable, bytes | ImageError], problems: list[Problem]) -> bool:
    """Whether an item's pictures can be read; their files are put into ``files``, what cannot into ``problems``."""
    for source in item.images:
        key = _key(source)
        if key not in files:
            try:
                load_image(source)
                files[key] = image_bytes(source)
            except ImageError as error:
                files[key] = error
        if isinstance(reason := files[key], ImageError):
            problems.append(Problem(name, str(reason)))
            return False
    return True


def _key(source: ImageSource) -> Any:
    return id(source) if isinstance(source, Image.Image) else source


def _rows(
    items: Sequence[tuple[str, Item]], files: Mapping[Hashable, bytes | ImageError], instructions: bool = False
) -> datasets.Dataset:
    """A table with the columns ``id``, ``text``, ``image``, ``instruction``, those that any of the items needs."""
    parts = _modalities([item for _, item in items])
    columns: dict[str, list[Any]] = {"id": [name for name, _ in items]}
    features: dict[str, Any] = {"id": datasets.Value("string")}
    if "t" in parts:
        columns["text"] = [item.text or "" for _, item in items]
        features["text"] = datasets.Value("string")
    if "i" in parts:
        cells = [[{"bytes": files[_key(source)], "path": None} for source in item.images] for _, item in items]
        several = any(len(cell) > 1 for cell in cells)
        columns["image"] = cells if several else [cell[0] if cell else None for cell in cells]
        features["image"] = datasets.List(datasets.Image()) if several else datasets.Image()
    if instructions:
        columns["instruction"] = [item.instruction or "" for _, item in items]
        features["instruction"] = datasets.Value("string")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _own_instructions(task: RetrievalTask) -> bool:
    return len({query.item.instruction for query in task.queries}) > 1


def _own_candidates(queries: Sequence[Query], candidates: Sequence[Candidate]) -> dict[str, list[str]] | None:
    """What each query chooses from, where any of them chooses from less than all."""
    if not any(query.candidates or query.excluded for query in queries):
        return None
    pool = [one.did for one in candidates]
    known = set(pool)
    return {
        query.qid: [did for did in query.candidates or pool if did in known and did not in query.excluded]
        for query in queries
    }
