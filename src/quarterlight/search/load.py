"""From shards of embeddings into an index, without a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from quarterlight.errors import StoreError
from quarterlight.images import describe
from quarterlight.index import VECTOR_PRECISIONS, IndexStore
from quarterlight.index.rows import is_item, list_key_of
from quarterlight.index.shards import ShardFolder
from quarterlight.search.walk import Problem


@dataclass(kw_only=True)
class LoadReport:
    """What was taken up.

    num_loaded: rows of the shards.  num_deleted: items that their lists no longer have, or have with other pictures.
    num_rows: rows of the table afterwards.
    problems: what the shards say could not be embedded.
    """

    num_shards: int = 0
    num_loaded: int = 0
    num_deleted: int = 0
    num_rows: int = 0
    seconds: float = 0.0
    problems: list[Problem] = field(default_factory=list)


def check_can_load(shards: ShardFolder, store: IndexStore) -> None:
    """Raises StoreError when shards are of another model, or coarser than the index keeps its vectors."""
    if shards.model.hash != store.model.hash:
        raise StoreError(
            f"{describe(shards.folder)} holds embeddings of model {shards.model}, the index in "
            f"{describe(store.folder)} is of model {store.model}: their vectors cannot be compared."
        )
    if VECTOR_PRECISIONS.index(shards.precision) > VECTOR_PRECISIONS.index(store.precision):
        raise StoreError(
            f"{describe(shards.folder)} holds embeddings as {shards.precision}, too coarse for the index in "
            f"{describe(store.folder)}, which keeps them as {store.precision}: an index cannot mix the two. Embed "
            f"again with --precision {store.precision}, or make another index with --store."
        )


def load(
    shards: ShardFolder, store: IndexStore, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> LoadReport:
    """Puts all rows of some shards into an index, in place of those that it had of the same files and items.

    Items that are no longer in a list that the shards have to its end are removed from the index.
    A stopped run leaves what it has done, and doing it again changes nothing.
    on_progress: called with the numbers of rows done and in all.
    Raises StoreError for shards of another model or coarser than the index, and when another process writes to it.
    """
    started = time.monotonic()
    check_can_load(shards, store)
    report = LoadReport()
    with store.writing():
        known = set(store.files())
        lists, items = shards.lists(), set[str]()
        infos = shards.shards()  # oldest first: what was written later wins
        total = sum(info.num_rows for info in infos)
        for info in infos:
            rows, vector_ND = shards.read(info)
            uris = {row.uri for row in rows}
            store.upsert(rows, vector_ND, known=sorted(uris & known))
            known |= uris
            items |= {uri for uri in uris if is_item(uri)}
            report.num_shards += 1
            report.num_loaded += len(rows)
            on_progress(report.num_loaded, total)
        vanished = [uri for uri in known - items if list_key_of(uri) in lists]
        store.delete(vanished)
        report.num_deleted = len(vanished)
        store.optimize()
        report.num_rows = store.count()
    report.problems = [Problem(*one) for one in shards.problems()]
    report.seconds = time.monotonic() - started
    return report
