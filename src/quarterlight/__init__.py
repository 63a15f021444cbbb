"""Universal multimodal retrieval: one model embeds text, images, both together and document pages into one space.

>>> from quarterlight import Embedder, Item, Reranker
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quarterlight.errors import QuarterlightError
from quarterlight.models.quantized import quiet_torchao
from quarterlight.records import Item
from quarterlight.registration import register

if TYPE_CHECKING:
    from quarterlight.models.embedder import Embedder
    from quarterlight.models.reranker import Reranker

__all__ = ["Embedder", "Item", "QuarterlightError", "Reranker", "__version__"]
__version__ = "0.1.0"

_LAZY = {  # public names whose modules import torch
    "Embedder": "quarterlight.models.embedder",
    "Reranker": "quarterlight.models.reranker",
}

register()
quiet_torchao()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
