"""LoRA: small trainable matrices beside the frozen weights of a language model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quarterlight.errors import RecipeError, check_least, did_you_mean
from quarterlight.models.adapter import merge_lora

__all__ = ["LoraRecipe", "add_lora", "merge_lora"]


@dataclass(frozen=True, kw_only=True)
class LoraRecipe:
    """What LoRA adds to the language model; vision tower and connector stay frozen (paper, section 5.2)."""

    rank: int = 16
    """columns between the two matrices of a layer (paper: 16)"""
    alpha: float = 32
    """what they add is multiplied by alpha / rank"""
    dropout: float = 0.05
    """share of a layer's inputs that its adapter does not see in training"""
    targets: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """last names of the linear layers that are adapted; all there are by default"""
    keep: bool = False
    """saves the adapter beside the weights it was trained on, rather than merged into them"""

    def __post_init__(self) -> None:
        check_least(self, rank=1)
        if self.alpha <= 0:
            raise RecipeError(f"alpha must be above 0, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"dropout must be at least 0 and below 1, got {self.dropout}.")
        if isinstance(self.targets, str) or not self.targets:
            raise RecipeError(f"targets must be a list of the names of linear layers, got {self.targets!r}.")


def add_lora(backbone: Any, recipe: LoraRecipe, seed: int) -> None:
    """Puts an adapter into the language model, in place, and freezes all else.

    A layer's output becomes ``W x + alpha / rank * B A x`` (arXiv:2106.09685, eq. 3) with A random and B zero, so that
    nothing has changed yet.  A and B are float32 whatever W is, for the sake of the optimiser.
    backbone: of any family, with or without a language head, which stays frozen too.
    seed: of A; the global random state is left alone.
    Raises RecipeError for a target that the language model does not have.
    """
    from peft import LoraConfig

    base = backbone.base_model
    known = {name.rpartition(".")[2] for name, one in base.language_model.named_modules() if isinstance(one, nn.Linear)}
    for target in recipe.targets:
        if target not in known:
            raise RecipeError(f"The language model has no linear layer {target!r}. {did_you_mean(target, known)}")
    names = "|".join(re.escape(target) for target in recipe.targets)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=recipe.dropout,
        target_modules=rf"language_model\..*\.({names})",  # the vision tower has layers of the same names
    )
    backbone.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # peft makes the matrices on the CPU
        base.add_adapter(config)
    for weight in base.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
