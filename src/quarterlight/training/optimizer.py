"""How a stage's weights are updated, and from where a stopped stage goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from quarterlight.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """AdamW with linear warm-up and cosine decay to zero."""

    num_steps: int
    """optimiser steps"""
    learning_rate: float
    """at its peak"""
    warmup_steps: int = 100
    """steps until the peak"""
    weight_decay: float = 0.05
    """decoupled; spares what ``Trainer`` spares: biases and layer norms"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    bf16: bool = True
    """autocast matrix products to bfloat16"""
    save_every: int = 500
    """steps between the checkpoints that a stopped run resumes from"""
    log_every: int = 50
    """steps between lines of the log"""
    num_workers: int = 1
    """processes that prepare batches; 0 prepares them between steps"""

    def __post_init__(self) -> None:
        for name in ("num_steps", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.learning_rate <= 0 or self.num_workers < 0:
            raise RecipeError(
                f"learning_rate must be above 0 and num_workers not below 0, got {self.learning_rate} and "
                f"{self.num_workers}."
            )
        if not 0 <= self.warmup_steps < self.num_steps:
            raise RecipeError(
                f"warmup_steps must be less than num_steps, or the peak is never reached; got {self.warmup_steps} of "
                f"{self.num_steps}."
            )

    def arguments(self, folder: Path, *, seed: int, **more: Any) -> TrainingArguments:
        """The same for ``Trainer``, on one device. A "sample" is a whole batch, hence batches of 1 in the given order.

        Raises RecipeError under a launcher of several processes.
        """
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=self.num_steps,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            bf16=self.bf16,
            use_cpu=not torch.cuda.is_available(),
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            dataloader_num_workers=self.num_workers,
            # a fork shares the rows that are loaded, where another start would have to pickle them
            dataloader_multiprocessing_context="fork" if self.num_workers else None,
            save_steps=self.save_every,
            save_total_limit=1,
            logging_steps=self.log_every,
            logging_nan_inf_filter=False,
            seed=seed,
            **more,
        )
        if arguments.world_size > 1:
            raise RecipeError(
                f"Training runs in one process, not in {arguments.world_size}: start it without a launcher."
            )
        arguments._n_gpu = min(1, arguments.n_gpu)  # DataParallel would join batches that do not belong together
        return arguments


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint that a stopped run left in ``folder``; ``None`` if there is none.

    ``Trainer`` writes a checkpoint in place and its state last: one without a readable state was cut short by a kill or
    a full disk, and is removed.
    """
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None
