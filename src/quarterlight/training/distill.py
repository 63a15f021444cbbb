"""Distillation of a reranker into an embedder (U-MARVEL, stage 3), by the trainer of contrastive training.

The loss is another, the rest is the same: chunks, processes, learnt temperature, validation.

Legend of shapes: Q queries and C candidates of a batch, U of them distinct, K those of one query, D columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quarterlight.data.contrastive import Instructions, TaskMixture
from quarterlight.data.distill import DistillBatch, DistillSampler, ScoredList
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import check_share
from quarterlight.losses.distill import distill, teacher_scores
from quarterlight.training.collate import ItemEncoder
from quarterlight.training.distributed import world_size
from quarterlight.training.embedder import EmbeddedBatch, EmbeddingTrainer, EmbedRecipe, fit
from quarterlight.training.optimizer import OptimizerRecipe
from quarterlight.training.prompt_embedder import PromptEmbedder


@dataclass(frozen=True, kw_only=True)
class DistillRecipe(EmbedRecipe):
    """What the stage does beyond its optimiser."""

    batch_size: int = 2
    """queries of a batch on each device, each with its whole list (U-MARVEL: 2)"""
    recall_weight: float = 0.5
    """a of the teacher's score, a * cosine + (1 - a) * P(Yes) (U-MARVEL: 0.5)"""
    instructions: Instructions = "first"
    """of a query that may have several: the first, or ``random``, any of them whenever it is in a batch (U-MARVEL)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "recall_weight")


class DistillTrainer(EmbeddingTrainer):
    """The trainer whose loss is the divergence from the teacher's ranking of each query's own list."""

    recipe: DistillRecipe

    def _batch_loss(self, one: EmbeddedBatch) -> Tensor:
        batch, query_QD = one.batch, one.query_QD
        assert isinstance(batch, DistillBatch)
        column_QK, listed_QK, recall_QK, rerank_QK = (
            torch.from_numpy(values).to(query_QD.device)
            for values in (batch.column, batch.listed, batch.recall, batch.rerank)
        )
        with torch.autocast(query_QD.device.type, enabled=False):
            student_QK = torch.einsum("qd,qkd->qk", query_QD, one.candidate_UD[one.index_C[column_QK]])
        return distill(
            student_QK,
            teacher_scores(recall_QK, rerank_QK, self.recipe.recall_weight),
            temperature=one.temperature,
            mask_QK=listed_QK & one.readable_Q[:, None] & one.readable_C[column_QK],
        )


def train_distill(
    model: PromptEmbedder,
    *,
    encode: ItemEncoder,
    mixture: TaskMixture,
    lists: Sequence[Mapping[str, ScoredList]],
    validation: Sequence[RetrievalTask],
    recipe: DistillRecipe,
    optimizer: OptimizerRecipe,
    folder: Path,
    seed: int,
) -> DistillTrainer:
    """Trains ``model`` in place on the lists of a teacher, and returns its trainer.

    lists: for each task of the mixture, query id -> its list.
    Processes, sharded weights and resuming are as in :func:`quarterlight.training.contrast.train_contrastive`.
    """
    sampler = DistillSampler(
        mixture,
        lists,
        batch_size=recipe.batch_size * world_size(),
        seed=seed,
        instructions=recipe.instructions,
    )
    return fit(
        DistillTrainer,
        model,
        sampler=sampler,
        steps_per_epoch=sampler.steps_per_epoch,
        encode=encode,
        validation=validation,
        recipe=recipe,
        optimizer=optimizer,
        folder=folder,
        seed=seed,
    )
