"""The families of multimodal language models that this package embeds with.

:data:`FAMILIES` is the only place that lists them; a new one is a row there, a package of transformers classes beside
``models/internvl_vtc`` and an adapter in here.  Nothing is imported with torch before it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quarterlight.models.backbones.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class Family:
    """A backbone with visual token compression.

    title: for people.  plain: transformers' model type of the same without compression.
    package: where its classes are.  prefix: with which their names begin.
    image_processor, processor: names of classes there.
    adapter: module and class, in this package, of its :class:`quarterlight.models.backbones.backbone.Backbone`.
    """

    title: str
    plain: str
    package: str
    prefix: str
    image_processor: str
    processor: str
    adapter: tuple[str, str]

    @property
    def config(self) -> str:
        """Name of the class of its configuration."""
        return f"{self.prefix}Config"

    @property
    def model(self) -> str:
        """Name of the class without a language head."""
        return f"{self.prefix}Model"

    @property
    def generation(self) -> str:
        """Name of the class with one."""
        return f"{self.prefix}ForConditionalGeneration"

    def module(self) -> ModuleType:
        """The package of its classes, each of which is imported when it is first asked for."""
        return import_module(self.package)

    def load(self, name: str) -> Any:
        """One of its classes."""
        return getattr(self.module(), name)


def _qwen(title: str, plain: str, prefix: str, adapter: tuple[str, str]) -> Family:
    return Family(
        title=title,
        plain=plain,
        package="quarterlight.models.qwen_vtc",
        prefix=prefix,
        image_processor="QwenVTCImageProcessor",
        processor="QwenVTCProcessor",
        adapter=adapter,
    )


FAMILIES = MappingProxyType(
    {
        "internvl_vtc": Family(
            title="InternVL in its -hf form",
            plain="internvl",
            package="quarterlight.models.internvl_vtc",
            prefix="InternVLVTC",
            image_processor="InternVLVTCImageProcessor",
            processor="InternVLVTCProcessor",
            adapter=("internvl", "InternVL"),
        ),
        "qwen2_vl_vtc": _qwen("Qwen2-VL", "qwen2_vl", "Qwen2VLVTC", ("qwen_vl", "QwenVL")),
        "qwen2_5_vl_vtc": _qwen("Qwen2.5-VL", "qwen2_5_vl", "Qwen2_5VLVTC", ("qwen_vl", "QwenVL")),
        "qwen3_vl_vtc": _qwen("Qwen3-VL", "qwen3_vl", "Qwen3VLVTC", ("qwen3_vl", "Qwen3VL")),
    }
)
"""Our model type -> the family."""


def our_model_type(model_type: str) -> str | None:
    """Our name of a model type with or without compression; ``None`` if we have no such family."""
    return next((name for name, family in FAMILIES.items() if model_type in (name, family.plain)), None)


def family_of(config: Any) -> Family:
    """The family of a model of ours."""
    return FAMILIES[config.model_type]


def backbone_of(config: Any) -> Backbone:
    """The adapter of a model of ours."""
    return backbone_named(config.model_type)


def backbone_named(model_type: str) -> Backbone:
    """The adapter of one of our model types."""
    module, name = FAMILIES[model_type].adapter
    adapter: Backbone = getattr(import_module(f"{__name__}.{module}"), name)()
    return adapter
