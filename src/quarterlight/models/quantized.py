"""A model whose layers keep their weights as int8.

Of the linear layers in the layers of vision tower and language model, torchao keeps each weight as int8, with a scale in
the model's dtype for each row (symmetric, round to nearest); activations stay as they are.  Left alone are what is
little or sensitive: word embeddings, which are looked up and not multiplied, the patch embedding, which is a
convolution, norms, and the connector, whose error every visual token would carry.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
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
    with quiet_torchao():
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise CheckpointError(
                f"quantization={quantization!r} needs torchao ({error}): pip install 'quarterlight[int8]'."
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


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """What torchao and torch log when torchao is imported goes to our own log, at the level of debugging.

    It tells of kernels for other hardware that cannot be loaded, and developers of names that will change; whoever
    imports transformers would read it.  What is raised is raised.
    """
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]

    def aside(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not message.startswith("Failed to load") and "is an Enum subclass" not in message:
            return True
        _log.debug("%s: %s", record.name, message)
        return False

    for one in loggers:
        one.addFilter(aside)
    try:
        yield
    finally:
        for one in loggers:
            one.removeFilter(aside)
