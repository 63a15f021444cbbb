"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL with visual token compression, as transformers classes.

The classes are imported when they are first asked for, as in the model packages of transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "QwenVTCImageProcessor": "processing",
    "QwenVTCProcessor": "processing",
    **{
        f"{name}VTC{suffix}": module
        for name in ("Qwen2VL", "Qwen2_5VL", "Qwen3VL")
        for suffix, module in {
            "Config": "configuration",
            "Model": "modeling",
            "ForConditionalGeneration": "modeling",
        }.items()
    },
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
