"""Published scores, to print beside ours: percent, as their papers print them.

``resources/reference.csv`` has Tables 3, 4 and 5 of Magic-MM-Embedding and U-MARVEL's tables of M-BEIR and of zero-shot
sets; ``resources/reference_per_dataset.csv`` has the scores that VLM2Vec publishes dataset by dataset, in three
releases.

What to know of them: the pages of ViDoSeek and MMLongBench-Doc were numbered one too far until ``v2.1-...`` of
VLM2Vec's scores, and Table 4 was made before that, so its columns stand beside our averages over the old page ids.  In
U-MARVEL's figure the two columns of Flickr30K, and the last two rows of the videos, are taken to be exchanged.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from quarterlight.errors import InputError, did_you_mean

PER_DATASET_SUITES = {"mmeb": "image", "mmeb-v2-image": "image", "visdoc": "visdoc"}
"""Suite -> what VLM2Vec calls it."""

_FIXED = "v2.1-baselines-visdoc-page-fixed"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A published row.

    backbone, size, block: as the table has them; empty where it has not.
    source: paper and table, or release.
    scores: name of a task or an average of the suite -> percent.
    """

    model: str
    backbone: str
    size: str
    block: str
    source: str
    scores: Mapping[str, float]

    @property
    def label(self) -> str:
        """Model, backbone and size, as far as they are known."""
        return " ".join(part for part in (self.model, self.backbone, self.size) if part and part != "-")


def tables() -> list[str]:
    """The names of the tables."""
    return list(_tables())


def references(table: str) -> list[Reference]:
    """The rows of a table in its order.  Raises InputError when there is none of this name.

    >>> references("visdoc")[0].label, references("visdoc")[0].scores["VisRAG"]
    ('GME Qwen2VL 2.2B', 82.5)
    """
    if table not in _tables():
        raise InputError(f"There is no table {table!r} of published scores. {did_you_mean(table, _tables())}")
    return _tables()[table]


@cache
def per_dataset(suite: str, release: str | None = None) -> list[Reference]:
    """VLM2Vec's scores for the tasks of a suite, by model; of one release, or of all.

    The old page ids of VisDoc are tasks of their own.  A suite without such scores has none.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in _rows("reference_per_dataset.csv"):
        if row["modality"] == PER_DATASET_SUITES.get(suite) and release in (None, row["score_release"]):
            scores = found.setdefault((row["score_release"], row["model"]), {})
            name = row["dataset"]
            if name in ("ViDoSeek-page", "MMLongBench-page"):
                name += "-fixed" if row["score_release"] == _FIXED else "-old"
            scores[name] = float(row["score_percent"])
    return [
        Reference(model=model, backbone="", size="", block="", source=f"VLM2Vec scores {of}", scores=scores)
        for (of, model), scores in found.items()
    ]


@cache
def _tables() -> dict[str, list[Reference]]:
    found: dict[str, dict[tuple[str, ...], dict[str, float]]] = {}
    for row in _rows("reference.csv"):
        key = (row["model"], row["backbone"], row["size"], row["block"], row["source"])
        found.setdefault(row["table"], {}).setdefault(key, {})[row["column"]] = float(row["score"])
    return {
        table: [
            Reference(model=model, backbone=backbone, size=size, block=block, source=source, scores=scores)
            for (model, backbone, size, block, source), scores in rows.items()
        ]
        for table, rows in found.items()
    }


def _rows(name: str) -> list[dict[str, str]]:
    text = (files("quarterlight.evaluation") / "resources" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
