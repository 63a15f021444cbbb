"""LoRA adapters that sit inside a backbone: its weights without them, and with them merged in."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from quarterlight.errors import CheckpointError


def has_adapter(backbone: Any) -> bool:
    """Whether a backbone, or a model with a language head, has an adapter inside that is not merged."""
    return hasattr(backbone.base_model, "peft_config")


def merge_lora(backbone: Any) -> None:
    """Adds the adapter to the weights it adapts, ``W + alpha / rank * B A``, and takes it out, in place.

    The model is then as if it had been loaded with these weights, all of them trainable; the sum is rounded to their
    dtype.  Raises CheckpointError when it is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = backbone.base_model
    adapted = [(name, module) for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        try:
            module.merge(safe_merge=True)
        except ValueError as error:
            raise CheckpointError(f"The adapter of {name} cannot be merged: its weights are not numbers.") from error
        base.set_submodule(name, module.get_base_layer())
    if has_adapter(base):
        del base.peft_config
        base._hf_peft_config_loaded = False  # where transformers looks
    backbone.requires_grad_(True)


def weights_without_adapter(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model under the names it has when no adapter is inside."""
    return {
        name.replace(".base_layer.", "."): weight for name, weight in model.state_dict().items() if ".lora_" not in name
    }
