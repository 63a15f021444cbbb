"""Contrastive training on ``transformers.Trainer``: task-homogeneous batches, InfoNCE, validation while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import Trainer

from quarterlight.data.contrastive import BatchSampler, TaskMixture
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import RecipeError
from quarterlight.losses.info_nce import info_nce
from quarterlight.metrics.ranking import hit, rank_embeddings
from quarterlight.models.shared_prefix import embed_shared_prefix
from quarterlight.prompts import Role
from quarterlight.records import Candidate, Item, Query
from quarterlight.training.collate import ContrastiveCollator, ContrastiveSteps, ItemEncoder
from quarterlight.training.optimizer import OptimizerRecipe, last_checkpoint


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
    eval_every: int = 1000
    """steps between validations; 0 for none"""
    eval_queries: int = 500
    """queries of a validation task that are tried, and as many candidates besides their positives"""

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "num_negatives": 0, "eval_every": 0, "eval_queries": 1}.items():
            if getattr(self, name) < least:
                raise RecipeError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.temperature <= 0:
            raise RecipeError(f"temperature must be above 0, got {self.temperature}.")


class ContrastiveTrainer(Trainer):
    """``Trainer`` with InfoNCE between two sides, and P@1 on validation tasks as its evaluation."""

    def __init__(
        self,
        *,
        encode: ItemEncoder,
        recipe: ContrastRecipe,
        validation: Sequence[RetrievalTask],
        teacher: nn.Module | None = None,
        teacher_weight: float = 0.0,
        **more: Any,
    ) -> None:
        more["eval_dataset"] = list(validation)  # Trainer asks for one, though evaluate() is ours
        super().__init__(**more)
        self.encode = encode
        self.recipe = recipe
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval()
        self.teacher_weight = teacher_weight

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
        if self.teacher is not None:
            weight = self.teacher_weight * (1 - self.state.global_step / self.state.max_steps)
            loss = loss + weight * (
                self._distance(query_QD, inputs["query"]["teacher"])
                + self._distance(candidate_UD, inputs["candidate"]["teacher"])
            )
        if not torch.isfinite(loss):
            raise RecipeError(
                f"The loss became {loss.item()} at step {inputs['step']}: lower the learning rate. "
                "The last checkpoint is kept."
            )
        return loss

    def _distance(self, embedding_BD: Tensor, teacher_inputs: Mapping[str, Any]) -> Tensor:
        """1 - cosine to the teacher's embeddings, averaged over the rows."""
        assert self.teacher is not None
        with torch.no_grad():
            wanted_BD = self.teacher(teacher_inputs)
        return 1 - (embedding_BD * wanted_BD).sum(dim=1).mean()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """P@1 per validation task, on a fixed part of it, and their mean."""
        metrics = {f"eval_p1_{task.dataset}_{task.task}": self._precision(task) for task in self.eval_dataset}
        metrics["eval_p1_mean"] = float(np.mean(list(metrics.values())))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _precision(self, task: RetrievalTask) -> float:
        queries = _evenly(task.queries, self.recipe.eval_queries)
        wanted = {did for query in queries for did in query.positives}
        others = [candidate for candidate in task.candidates if candidate.did not in wanted]
        candidates = [candidate for candidate in task.candidates if candidate.did in wanted]
        candidates += _evenly(others, self.recipe.eval_queries)
        column = {candidate.did: index for index, candidate in enumerate(candidates)}
        ranks = rank_embeddings(
            self._embed_all([query.item for query in queries], "query"),
            self._embed_all([candidate.item for candidate in candidates], "document"),
            [[column[did] for did in query.positives] for query in queries],
        )
        return float(hit(ranks, k=1).mean())

    @torch.inference_mode()
    def _embed_all(self, items: Sequence[Item], role: Role) -> npt.NDArray[np.float32]:
        model = self.model.eval()
        batches = (
            items[start : start + self.recipe.batch_size] for start in range(0, len(items), self.recipe.batch_size)
        )
        parts = [model(self._prepare_inputs(self.encode(batch, role, None))).float().cpu() for batch in batches]
        model.train()
        return torch.cat(parts).numpy()


_Record = TypeVar("_Record", Query, Candidate)


def _evenly(records: Sequence[_Record], limit: int) -> list[_Record]:
    """At most ``limit`` of the records, spread over all of them."""
    return [records[index] for index in np.linspace(0, len(records) - 1, min(limit, len(records))).astype(int)]


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
    teacher: nn.Module | None = None,
    teacher_weight: float = 0.0,
) -> ContrastiveTrainer:
    """Trains ``model``, a :class:`PromptEmbedder` or a teacher, in place, and returns its trainer.

    teacher, teacher_weight: adds 1 - cosine to the teacher's embedding of the same item, so weighted at the first step
        and falling linearly to zero; ``encode`` must then make the teacher's inputs too.
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
        teacher=teacher,
        teacher_weight=teacher_weight,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    return trainer
