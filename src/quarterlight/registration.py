"""Teaches transformers' Auto classes our model types, without importing transformers.

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

from quarterlight.models.backbones import FAMILIES, Family

_AUTO = "transformers.models.auto."


def _tables(family: Family) -> dict[str, dict[str, Any]]:
    """Module of transformers -> its tables -> the row of a family."""
    return {
        _AUTO + "configuration_auto": {"CONFIG_MAPPING_NAMES": family.config},
        _AUTO + "modeling_auto": {
            "MODEL_MAPPING_NAMES": family.model,
            "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": family.generation,
            "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": family.generation,
        },
        _AUTO + "image_processing_auto": {"IMAGE_PROCESSOR_MAPPING_NAMES": {"pil": family.image_processor}},
        _AUTO + "processing_auto": {"PROCESSOR_MAPPING_NAMES": family.processor},
    }


_TABLES = {model_type: _tables(family) for model_type, family in FAMILIES.items()}
"""Model type -> its rows."""

_MODULES = frozenset(module for tables in _TABLES.values() for module in tables)


def register() -> None:
    """Registers our classes now or, if transformers has not been imported, when it is. May be called again."""
    if _AUTO + "configuration_auto" in sys.modules:
        for model_type, family in FAMILIES.items():
            _register_now(model_type, family)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        for model_type, family in FAMILIES.items():
            sys.modules["transformers.models." + model_type] = family.module()
        sys.meta_path.insert(0, _AfterImport())


def _register_now(model_type: str, family: Family) -> None:
    import transformers

    config, generation = family.load(family.config), family.load(family.generation)
    transformers.AutoConfig.register(model_type, config, exist_ok=True)
    transformers.AutoModel.register(config, family.load(family.model), exist_ok=True)
    transformers.AutoModelForImageTextToText.register(config, generation, exist_ok=True)
    transformers.AutoModelForMultimodalLM.register(config, generation, exist_ok=True)
    transformers.AutoImageProcessor.register(
        config, image_processor_classes={"pil": family.load(family.image_processor)}, exist_ok=True
    )
    transformers.AutoProcessor.register(config, family.load(family.processor), exist_ok=True)


class _AfterImport(MetaPathFinder, Loader):
    """Lets everyone else find and load the modules above, then adds our rows."""

    def __init__(self) -> None:
        self._loaders: dict[str, Any] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _MODULES or fullname in self._loaders:
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
        for model_type, tables in _TABLES.items():
            for table, row in tables[spec.name].items():
                getattr(module, table)[model_type] = row
