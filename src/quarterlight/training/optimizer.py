"""How a stage's weights are updated, and from where a stopped stage goes on."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from quarterlight.errors import RecipeError, check_least
from quarterlight.models.embedder import best_dtype
from quarterlight.training.distributed import processes

_WARMUP_RATIO = 0.05


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """AdamW with linear warm-up and cosine decay to zero."""

    num_steps: int | None = None
    """optimiser steps; either these or ``num_epochs``"""
    num_epochs: float | None = None
    """how often each sample is seen, on average"""
    learning_rate: float
    """at its peak"""
    warmup_steps: int | None = None
    """steps until the peak"""
    warmup_ratio: float | None = None
    """the same as a share of all steps: 0.05 where neither is given"""
    weight_decay: float = 0.05
    """decoupled; spares what ``Trainer`` spares: biases and layer norms"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    gradient_accumulation_steps: int = 1
    """batches of a step"""
    gradient_checkpointing: bool = False
    """works the layers' activations out again in the backward pass: a third more time for a fraction of the memory"""
    bf16: bool = True
    """autocast matrix products to bfloat16, on hardware that multiplies it; elsewhere that would cost tenfold"""
    save_every: int = 500
    """steps between the checkpoints that a stopped run resumes from"""
    log_every: int = 50
    """steps between lines of the log"""
    num_workers: int = 1
    """threads (of the stage ``tower``: processes) that prepare batches; 0 prepares them between steps"""

    def __post_init__(self) -> None:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise RecipeError(
                f"An optimizer takes either num_steps or num_epochs, got {self.num_steps} and {self.num_epochs}."
            )
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise RecipeError(
                f"An optimizer takes either warmup_steps or warmup_ratio, got {self.warmup_steps} and "
                f"{self.warmup_ratio}."
            )
        check_least(self, num_steps=1, save_every=1, log_every=1, gradient_accumulation_steps=1)
        if self.num_epochs is not None and not 0 < self.num_epochs < math.inf:
            raise RecipeError(f"num_epochs must be above 0, got {self.num_epochs}.")
        if self.learning_rate <= 0 or self.num_workers < 0:
            raise RecipeError(
                f"learning_rate must be above 0 and num_workers not below 0, got {self.learning_rate} and "
                f"{self.num_workers}."
            )
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio < 1:
            raise RecipeError(f"warmup_ratio must be at least 0 and below 1, got {self.warmup_ratio}.")
        if self.num_steps is not None:
            self._warmup(self.num_steps)

    def steps(self, num_samples: int, samples_per_step: int) -> int:
        """How many optimiser steps the stage takes on so many samples, when each step takes so many of them.

        samples_per_step: over all devices and accumulated batches.

        >>> OptimizerRecipe(num_epochs=2, learning_rate=1e-4).steps(num_samples=1000, samples_per_step=96)
        21
        """
        if self.num_steps is not None:
            return self.num_steps
        assert self.num_epochs is not None
        return max(1, math.ceil(self.num_epochs * num_samples / samples_per_step))

    @property
    def autocasts(self) -> bool:
        """Whether matrix products are in bfloat16 on this machine."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return self.bf16 and best_dtype(device) is torch.bfloat16

    def _warmup(self, num_steps: int) -> int:
        if self.warmup_steps is None:
            return int((_WARMUP_RATIO if self.warmup_ratio is None else self.warmup_ratio) * num_steps)
        if not 0 <= self.warmup_steps < num_steps:
            raise RecipeError(
                f"warmup_steps must be less than num_steps, or the peak is never reached; got {self.warmup_steps} of "
                f"{num_steps}."
            )
        return self.warmup_steps

    def arguments(self, folder: Path, *, seed: int, num_steps: int | None = None, **more: Any) -> TrainingArguments:
        """The same for ``Trainer``. A "sample" is a whole batch, hence batches of 1 in the given order.

        num_steps: what :meth:`steps` gave; needed where the recipe counts epochs.  more: of ``TrainingArguments``.
        """
        num_steps = num_steps or self.num_steps
        assert num_steps is not None, "a recipe that counts epochs needs the steps they come to"
        values: dict[str, Any] = {
            "output_dir": str(folder),
            "max_steps": num_steps,
            "learning_rate": self.learning_rate,
            "warmup_steps": self._warmup(num_steps),
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "lr_scheduler_type": "cosine",
            "optim": "adamw_torch_fused",
            "bf16": self.autocasts,
            "use_cpu": not torch.cuda.is_available(),
            "per_device_train_batch_size": 1,
            "train_sampling_strategy": "sequential",
            "remove_unused_columns": False,
            "dataloader_num_workers": self.num_workers,
            # a fork shares the rows that are loaded, where another start would have to pickle them
            "dataloader_multiprocessing_context": "fork" if self.num_workers else None,
            "save_steps": self.save_every,
            "save_total_limit": 1,
            "logging_steps": self.log_every,
            "logging_nan_inf_filter": False,
            "seed": seed,
        }
        arguments = TrainingArguments(**(values | more))
        arguments._n_gpu = min(1, arguments.n_gpu)  # DataParallel would join batches that do not belong together
        return arguments

    def threaded(self, folder: Path, *, seed: int, num_steps: int, eval_every: int = 0) -> TrainingArguments:
        """The same where threads of our own prepare the batches, and the loader of ``Trainer`` only hands them on.

        eval_every: steps between validations; 0 for none.
        """
        return self.arguments(
            folder,
            seed=seed,
            num_steps=num_steps,
            dataloader_num_workers=0,
            dataloader_multiprocessing_context=None,
            eval_strategy="steps" if eval_every else "no",
            eval_steps=eval_every or None,
        )


def tensorboard(folder: Path) -> TensorBoardCallback:
    """Writes what ``Trainer`` logs to ``folder/tensorboard``."""
    callback = TensorBoardCallback()
    callback.logging_dir = str(folder / "tensorboard")  # its own choice is named after the machine and the time
    return callback


def recompute_activations(model: Any) -> None:
    """Turns gradient checkpointing on for a transformers model."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint that a stopped run left in ``folder``; ``None`` if there is none.

    ``Trainer`` writes a checkpoint in place and its state last: one without a readable state was cut short by a kill or
    a full disk, and is removed.
    """
    with processes().main_process_first():  # the others look when the first has tidied up
        for checkpoint in folder.glob("checkpoint-*"):
            try:
                json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                shutil.rmtree(checkpoint)
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None
