"""Published benchmarks as retrieval tasks: one module for each layout in which they lie on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from quarterlight.data.benchmarks import (
    beir,
    captions,
    circo,
    fashioniq_turns,
    genecis,
    mbeir,
    mmeb,
    mmeb_v2,
    pairs_of_captions,
    retrieval_folder,
    videos,
    vidore_qa,
    visdial,
    vist,
)
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.retrieval import RetrievalTask

Loader: TypeAlias = Callable[[Source], RetrievalTask]
"""Reads one use of one dataset.  Raises DatasetError, with file and row, for what breaks the layout."""

LOADERS: Mapping[str, Loader] = MappingProxyType(
    {
        "mmeb": mmeb.load,
        "mmeb_v2": mmeb_v2.load,
        "beir": beir.load,
        "vidore_qa": vidore_qa.load,
        "captions": captions.load,
        "sugarcrepe": pairs_of_captions.load_sugarcrepe,
        "ccneg": pairs_of_captions.load_ccneg,
        "mbeir": mbeir.load,
        "circo": circo.load,
        "genecis": genecis.load,
        "visdial": visdial.load,
        "vist": vist.load,
        "fashioniq_turns": fashioniq_turns.load,
        "msrvtt": videos.load_msrvtt,
        "msvd": videos.load_msvd,
        "retrieval": retrieval_folder.load,
    }
)
"""Layout -> what reads it."""
