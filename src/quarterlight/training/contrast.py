"""Contrastive training on ``transformers.Trainer``: task-homogeneous batches, InfoNCE, validation while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from quarterlight.data.contrastive import BatchSampler, TaskMixture
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import RecipeError
from quarterlight.losses.info_nce import info_nce
from quarterlight.models.shared_prefix import embed_shared_prefix
from quarterlight.prompts import Role, query_instruction
from quarterlight.records import Item
from quarterlight.training.collate import ContrastiveCollator, ContrastiveSteps, ItemEncoder


class PromptEmbedder(nn.Module):
    """A backbone as training sees it: inputs of one side of a batch in, embeddings of norm 1 out, ``[B, D]``.

    ``Trainer`` saves a transformers model under the names of its published weights, but resumes it without translating
    them back: the language model of an InternVL would start anew without a word.  In here it keeps its names.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        return embed_shared_prefix(self.backbone, inputs)


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
    """decoupled; not on biases and norms"""
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
        if self.num_steps < 1 or self.learning_rate <= 0:
            raise RecipeError(
                f"A stage needs num_steps of at least 1 and a learning_rate above 0, got {self.num_steps} and "
                f"{self.learning_rate}."
            )

    def arguments(self, folder: Path, *, seed: int, **more: Any) -> TrainingArguments:
        """The same for ``Trainer``. A "sample" is a whole batch, hence the batch size of 1 and the given order."""
        return TrainingArguments(
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
            save_steps=self.save_every,
            save_total_limit=1,
            logging_steps=self.log_every,
            seed=seed,
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class ContrastRecipe:
    """What a contrastive stage does beyond its optimiser."""

    batch_size: int = 256
    """queries of a batch, all of one task"""
    num_negatives: int = 0
    """labelled hard negatives per query, at most"""
    temperature: float = 0.03
    """divides the scores (paper: 0.03)"""
    symmetric: bool = False
    """also ask each target for its query"""
    guide_weight: float = 0.0
    """of 1 - cosine to the teacher's embedding of the same item, at the first step; falls linearly to zero"""
    eval_every: int = 1000
    """steps between validations; 0 for none"""
    eval_queries: int = 500
    """queries of a validation task that are tried, and as many candidates besides their positives"""


class ContrastiveTrainer(Trainer):
    """``Trainer`` with InfoNCE between two sides, and P@1 on validation tasks as its evaluation."""

    def __init__(
        self,
        *,
        encode: ItemEncoder,
        recipe: ContrastRecipe,
        validation: Sequence[RetrievalTask],
        guide: nn.Module | None = None,
        **more: Any,
    ) -> None:
        more["eval_dataset"] = list(validation)  # Trainer asks for one, though evaluate() is ours
        super().__init__(**more)
        self.model_accepts_loss_kwargs = False
        self.encode = encode
        self.recipe = recipe
        self.validation = validation
        self.guide = guide

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """InfoNCE of one batch (paper, eq. 2). Raises RecipeError on a loss that is not finite, naming the step."""
        query_QD, candidate_UD = model(inputs["query"]), model(inputs["candidate"])
        loss = info_nce(
            query_QD,
            candidate_UD[inputs["candidate_index"]],
            temperature=self.recipe.temperature,
            known_positive_QC=inputs["known_positive"],
            symmetric=self.recipe.symmetric,
        )
        if self.guide is not None:
            weight = self.recipe.guide_weight * (1 - self.state.global_step / self.state.max_steps)
            loss = loss + weight * (
                self._distance(query_QD, inputs["query"]["guide"])
                + self._distance(candidate_UD, inputs["candidate"]["guide"])
            )
        if not torch.isfinite(loss):
            raise RecipeError(
                f"The loss became {loss.item()} at step {inputs['step']}: lower the learning rate. "
                "The last checkpoint is kept."
            )
        return loss

    def _distance(self, embedding_BD: Tensor, guide_inputs: Mapping[str, Any]) -> Tensor:
        """1 - cosine to the guide's embeddings, averaged over the rows."""
        assert self.guide is not None
        with torch.no_grad():
            wanted_BD = self.guide(guide_inputs)
        return 1 - (embedding_BD * wanted_BD).sum(dim=1).mean()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """P@1 per validation task (ties count against it), and their mean."""
        metrics = {f"eval_p1_{task.dataset}_{task.task}": self._precision(task) for task in self.validation}
        metrics["eval_p1_mean"] = float(np.mean(list(metrics.values())))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _precision(self, task: RetrievalTask) -> float:
        limit = self.recipe.eval_queries
        queries = task.queries[:: max(1, len(task.queries) // limit)][:limit]
        wanted = {did for query in queries for did in query.positives}
        others = [c for c in task.candidates if c.did not in wanted]
        candidates = [c for c in task.candidates if c.did in wanted] + others[:: max(1, len(others) // limit)][:limit]
        query_QD = self._embed_all([query.item for query in queries], "query", query_instruction(task.task))
        candidate_CD = self._embed_all([candidate.item for candidate in candidates], "document", None)
        score_QC = query_QD @ candidate_CD.T
        positive_QC = torch.tensor([[c.did in set(query.positives) for c in candidates] for query in queries])
        best_Q = score_QC.masked_fill(~positive_QC, -torch.inf).amax(dim=1)
        rival_Q = score_QC.masked_fill(positive_QC, -torch.inf).amax(dim=1)
        return (best_Q > rival_Q).float().mean().item()

    @torch.inference_mode()
    def _embed_all(self, items: list[Item], role: Role, instruction: str | None) -> Tensor:
        model = self.model.eval()
        size, parts = self.recipe.batch_size, []
        for start in range(0, len(items), size):
            inputs = self._prepare_inputs(self.encode(items[start : start + size], role, instruction, None))
            with self.compute_loss_context_manager():
                parts.append(model(inputs).float().cpu())
        model.train()
        return torch.cat(parts)


def train_contrastive(
    model: nn.Module,
    *,
    encode: ItemEncoder,
    mixture: TaskMixture,
    validation: Sequence[RetrievalTask],
    recipe: ContrastRecipe,
    optimizer: OptimizerRecipe,
    folder: Path,
    seed: int,
    guide: nn.Module | None = None,
) -> ContrastiveTrainer:
    """Trains ``model``, a :class:`PromptEmbedder` or a teacher, in place, and returns its trainer.

    Resumes from ``folder`` if a run was stopped there.
    """
    sampler = BatchSampler(mixture, batch_size=recipe.batch_size, num_negatives=recipe.num_negatives, seed=seed)
    evaluating = recipe.eval_every > 0 and len(validation) > 0
    arguments = optimizer.arguments(
        folder,
        seed=seed,
        eval_strategy="steps" if evaluating else "no",
        eval_steps=recipe.eval_every if evaluating else None,
    )
    trainer = ContrastiveTrainer(
        model=model,
        args=arguments,
        train_dataset=ContrastiveSteps(sampler, optimizer.num_steps),
        data_collator=ContrastiveCollator(encode, seed=seed),
        encode=encode,
        recipe=recipe,
        validation=validation,
        guide=guide,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    return trainer
