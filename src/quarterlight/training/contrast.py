"""Contrastive training of an embedder: InfoNCE over all processes.

Q queries and C candidates of a batch, D columns of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from quarterlight.data.contrastive import BatchSampler, ContrastiveBatch, Instructions, TaskMixture
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import RecipeError, check_least
from quarterlight.losses.info_nce import info_nce
from quarterlight.training.collate import ItemEncoder
from quarterlight.training.distributed import world_size
from quarterlight.training.embedder import EmbeddedBatch, EmbeddingTrainer, EmbedRecipe, fit
from quarterlight.training.optimizer import OptimizerRecipe


@dataclass(frozen=True, kw_only=True)
class ContrastRecipe(EmbedRecipe):
    """What a contrastive stage does beyond its optimiser."""

    sub_batch_size: int | None = None
    """the batch of all devices is made of runs of so many queries, each of one task; without it, it is of one task"""
    num_negatives: int = 0
    """hard negatives per query, at most"""
    fill: Literal["none", "repeat"] = "none"
    """a query with fewer negatives has fewer (none), or has some of them twice (repeat)"""
    instructions: Instructions = "first"
    """which a query has of several: always the first, or any, drawn anew for every batch (U-MARVEL: random)"""
    in_batch: bool = True
    """a query's negatives are also the candidates of the other queries; without it, its own hard negatives alone"""
    symmetric: bool = False
    """also ask each target for its query, and take the mean of both losses"""
    backward_weight: float = 0.0
    """in place of ``symmetric``: adds so much of the loss from targets to queries (U-MARVEL on captions: 1)"""
    hardness_weight: float = 0.0
    """adds so much of its score to the logit of each negative, without gradient (LLaVE, arXiv:2503.04812)"""
    dimensions: Sequence[int] | None = None
    """the loss is the mean over so many first columns of the embeddings (Matryoshka); without them, it is of all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, sub_batch_size=1, num_negatives=0, hardness_weight=0, backward_weight=0)
        if self.fill not in ("none", "repeat"):
            raise RecipeError(f"fill must be none or repeat, got {self.fill!r}.")
        if self.symmetric and self.backward_weight:
            raise RecipeError(
                f"symmetric is the mean of both directions, backward_weight ({self.backward_weight}) adds one to the "
                "other: give one of them."
            )
        if not self.in_batch and (self.symmetric or self.backward_weight or not self.num_negatives):
            raise RecipeError(
                "Without in_batch a query is compared with its own hard negatives alone: it needs num_negatives, and "
                "has no loss from targets to queries (symmetric, backward_weight)."
            )
        if self.dimensions is not None and (not self.dimensions or min(self.dimensions) < 1):
            raise RecipeError(f"dimensions must be a list of numbers of columns, got {self.dimensions}.")


class ContrastiveTrainer(EmbeddingTrainer):
    """The trainer whose loss is InfoNCE (Magic-MM-Embedding, eq. 2)."""

    recipe: ContrastRecipe

    def _batch_loss(self, one: EmbeddedBatch) -> Tensor:
        batch, query_QD, readable_Q, readable_C = one.batch, one.query_QD, one.readable_Q, one.readable_C
        assert isinstance(batch, ContrastiveBatch)
        self._check_width(query_QD.shape[1])
        masks: dict[str, Any] = {}
        if not (readable_Q.all() and readable_C.all()):
            masks = {"row_mask_Q": readable_Q & readable_C[: len(query_QD)], "candidate_mask_C": readable_C}
        left_out_QC = batch.known_positive
        if not self.recipe.in_batch:
            others_QC = batch.owner != np.arange(len(query_QD))[:, None]
            left_out_QC = left_out_QC | others_QC
        return info_nce(
            query_QD,
            one.candidate_UD[one.index_C],
            temperature=one.temperature,
            known_positive_QC=torch.from_numpy(left_out_QC).to(self.args.device),
            symmetric=self.recipe.symmetric,
            backward_weight=self.recipe.backward_weight,
            hardness_weight=self.recipe.hardness_weight,
            dimensions=self.recipe.dimensions,
            **masks,
        )

    def _check_width(self, width: int) -> None:
        if self.recipe.dimensions is not None and max(self.recipe.dimensions) > width:
            raise RecipeError(
                f"dimensions must not be above the {width} columns of the model's embeddings, got "
                f"{list(self.recipe.dimensions)}."
            )


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
    Under a launcher of several processes (torchrun, accelerate launch) they train together.  Where the weights are
    sharded, the first process's model has them whole in the end.
    Resumes from ``folder`` if a run was stopped there.
    """
    sampler = BatchSampler(
        mixture,
        batch_size=recipe.batch_size * world_size(),
        num_negatives=recipe.num_negatives,
        seed=seed,
        sub_batch_size=recipe.sub_batch_size,
        fill=recipe.fill,
        instructions=recipe.instructions,
    )
    return fit(
        ContrastiveTrainer,
        model,
        sampler=sampler,
        steps_per_epoch=sampler.steps_per_epoch,
        encode=encode,
        validation=validation,
        recipe=recipe,
        optimizer=optimizer,
        folder=folder,
        seed=seed,
        teacher=teacher,
        teacher_weight=teacher_weight,
    )
