"""InternVL3 with visual token compression: the backbone of Magic-MM-Embedding, as transformers classes.

The classes are imported when they are first asked for, as in the model packages of transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "InternVLVTCConfig": "configuration",
    "InternVLVTCModel": "modeling",
    "InternVLVTCForConditionalGeneration": "modeling",
    "InternVLVTCImageProcessor": "processing",
    "InternVLVTCProcessor": "processing",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
