"""A model whose layers keep their weights as int8.

Of the linear layers in the layers of vision tower and language model, torchao keeps each weight as int8, with a scale
in the model's dtype for each row (symmetric); activations stay as they are.  Left alone is what is no product or costs
little: word embeddings, which are looked up, the patch embedding, which is a convolution, norms, and the connector,
two small products whose error every visual token would carry.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from quarterlight.errors import CheckpointError, InputError, did_you_mean
from quarterlight.models.backbones import backbone_of

if TYPE_CHECKING:  # the command line reads names from here without paying for torch
    from torch import Tensor

Quantization: TypeAlias = Literal["int8"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

_MARK = "quarterlight_quantization"
"""Attribute of a quantised model."""

_log = logging.getLogger(__name__)


def quantize(model: Any, quantization: Quantization) -> None:
    """Quantises the layers of a model in memory, with or without a language head, which is left alone.

    Adapters must be merged before.  Memory is that of the whole model until the last layer is done.
    Raises InputError for a kind that is not known, CheckpointError when torchao is missing.
    """
    if quantization not in QUANTIZATIONS:
        raise InputError(f"There is no quantization {quantization!r}. {did_you_mean(quantization, QUANTIZATIONS)}")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise CheckpointError(
            f"quantization={quantization!r} needs torchao ({error}): pip install -e '.[int8]'."
        ) from error
    base = model.base_model
    for name in layers_of(base):
        # the settings of the compiler belong to the process, not to this model
        quantize_(base.get_submodule(name), Int8WeightOnlyConfig(set_inductor_config=False))
    setattr(base, _MARK, quantization)


def layers_of(base: Any) -> tuple[str, str]:
    """The lists of layers of vision tower and language model in a model without a language head."""
    return backbone_of(base.config).tower_layers, "language_model.layers"


def quantization_of(model: Any) -> Quantization | None:
    """How the weights of a model are kept; ``None`` for a whole one."""
    found: Quantization | None = getattr(model.base_model, _MARK, None)
    return found


def named_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each weight of a model in memory, in the order of their names; int8 as the numbers it stands
    for."""
    for name, tensor in sorted(model.state_dict().items()):
        yield name, tensor.dequantize() if hasattr(tensor, "qdata") else tensor


def quiet_torchao() -> None:
    """From now on what torchao has to say when it is imported goes to our own log, at the level of debugging.

    transformers imports it wherever it is installed, and users would read of kernels for other hardware that cannot be
    loaded, and of names that developers should change.  What is raised is raised, and all else is logged as ever.
    """
    for name, beginnings in _NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Aside) for one in logger.filters):
            logger.addFilter(_Aside(beginnings))


_NOISE = {
    "torchao": ("Failed to load ",),
    "torchao.kernel.intmm": ("Warning: Detected no triton",),
    "torch.utils._pytree": ("<enum 'KernelPreference'>", "<enum 'ScaleCalculationMode'>"),
}
"""Logger -> how messages begin."""


class _Aside(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not message.startswith(self.beginnings):
            return True
        _log.debug("%s: %s", record.name, message)
        return False
