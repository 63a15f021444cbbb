"""Published training data as examples for retrieval: one function for each layout in which it lies on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from quarterlight.data.corpora import captioned, mbeir_train, megapairs, mmeb_train, pages, texts
from quarterlight.data.corpora.example import Corpus, Examples

CORPORA: Mapping[str, Callable[[Corpus], Examples]] = MappingProxyType(
    {
        "mmeb_train": mmeb_train.read,
        "mme5": mmeb_train.read_mme5,
        "megapairs": megapairs.read,
        "pages": pages.read,
        "docmatix": pages.read_docmatix,
        "pairs": texts.read,
        "nli": texts.read_nli,
        "captions": captioned.read,
        "cc3m": captioned.read_cc3m,
        "classes": captioned.read_classes,
        "mbeir": mbeir_train.read,
    }
)
"""Layout -> what reads it, row by row."""

INSTRUCTIONS: Mapping[str, Callable[[Corpus], tuple[str, ...]]] = MappingProxyType({"mbeir": mbeir_train.instructions})
"""Layout -> what says the instructions that queries may have, where the rows themselves do not; none for most."""
