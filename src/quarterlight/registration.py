"""Teaches transformers' Auto classes the model type ``internvl_vtc``, without importing transformers.

``import quarterlight; SentenceTransformer(path)`` has to work, in either order of imports, and ``quarterlight --help``
must not pay for torch.  If transformers is there already, its public ``register`` functions are called.  If not, rows
are added to its tables of lazily imported classes as soon as the module of each table has been imported, by whomever;
the rows lead to our package, which is put where transformers looks for its own.  (Calling ``register`` at that moment
is not possible: it needs our classes, they need InternVL's, and those the very modules that are being imported.)
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from quarterlight.models import internvl_vtc

MODEL_TYPE = "internvl_vtc"

_AUTO = "transformers.models.auto."
_TABLES: dict[str, dict[str, Any]] = {
    _AUTO + "configuration_auto": {"CONFIG_MAPPING_NAMES": "InternVLVTCConfig"},
    _AUTO + "modeling_auto": {
        "MODEL_MAPPING_NAMES": "InternVLVTCModel",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "InternVLVTCForConditionalGeneration",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": "InternVLVTCForConditionalGeneration",
    },
    _AUTO + "image_processing_auto": {"IMAGE_PROCESSOR_MAPPING_NAMES": {"pil": "InternVLVTCImageProcessor"}},
    _AUTO + "processing_auto": {"PROCESSOR_MAPPING_NAMES": "InternVLVTCProcessor"},
}
"""Module -> its tables -> the row of our model type."""


def register() -> None:
    """Registers our classes now or, if transformers has not been imported, when it is. May be called again."""
    if _AUTO + "configuration_auto" in sys.modules:
        _register_now()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.modules["transformers.models." + MODEL_TYPE] = internvl_vtc
        sys.meta_path.insert(0, _AfterImport())


def _register_now() -> None:
    import transformers

    config = internvl_vtc.InternVLVTCConfig
    generation = internvl_vtc.InternVLVTCForConditionalGeneration
    transformers.AutoConfig.register(MODEL_TYPE, config, exist_ok=True)
    transformers.AutoModel.register(config, internvl_vtc.InternVLVTCModel, exist_ok=True)
    transformers.AutoModelForImageTextToText.register(config, generation, exist_ok=True)
    transformers.AutoModelForMultimodalLM.register(config, generation, exist_ok=True)
    transformers.AutoImageProcessor.register(
        config, image_processor_classes={"pil": internvl_vtc.InternVLVTCImageProcessor}, exist_ok=True
    )
    transformers.AutoProcessor.register(config, internvl_vtc.InternVLVTCProcessor, exist_ok=True)


class _AfterImport(MetaPathFinder, Loader):
    """Lets everyone else find and load the modules above, then adds our rows."""

    def __init__(self) -> None:
        self._loaders: dict[str, Any] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _TABLES or fullname in self._loaders:
            return None
        self._loaders[fullname] = None  # the search on the next line comes past here again
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            self._loaders[fullname], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loaders[spec.name].create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self._loaders[spec.name]
        spec.loader.exec_module(module)
        for table, row in _TABLES[spec.name].items():
            getattr(module, table)[MODEL_TYPE] = row
