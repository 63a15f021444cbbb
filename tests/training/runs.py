"""A small task of texts, pictures and pages, and a tiny model that learns it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from quarterlight.data.contrastive import BatchSampler, TaskMixture
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.models.checkpoint import load_backbone, load_settings
from quarterlight.models.inputs import InputFormatter
from quarterlight.records import Candidate, Item, Query
from quarterlight.training.augment import AugmentRecipe
from quarterlight.training.collate import ContrastiveSteps, Pictures, PromptEncoder
from quarterlight.training.contrast import ContrastiveTrainer, ContrastRecipe
from quarterlight.training.optimizer import OptimizerRecipe
from quarterlight.training.prompt_embedder import PromptEmbedder

NUM_QUERIES = 13
"""Odd, so that two processes have different shares."""


def optimizer(**changes: Any) -> OptimizerRecipe:
    """Four steps in float32."""
    values: dict[str, Any] = {"num_steps": 4, "warmup_steps": 1, "bf16": False, "save_every": 2, "log_every": 1}
    return OptimizerRecipe(**{**values, "learning_rate": 1e-3, "num_workers": 0, **changes})


def mixed_task(folder: Path) -> RetrievalTask:
    """Queries and candidates in turn a text, a picture with text, and a page of several tiles."""

    def item(number: int, turn: int) -> Item:
        size = (200, 200) if turn % 3 == 2 else (64, 48)
        file = folder / f"{number}.{size[0]}.png"
        if turn % 3 and not file.exists():
            blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(file)
        text = None if turn % 3 == 2 else f"number {number} " + "and so on " * (number % 4)
        return Item(text=text, image=file if turn % 3 else None, max_tiles=4 if turn % 3 == 2 else 1)

    folder.mkdir(parents=True, exist_ok=True)
    candidates = [Candidate(did=f"d{n}", item=item(100 + n, n // 2)) for n in range(2 * NUM_QUERIES)]
    queries = [
        Query(qid=f"q{n}", item=item(n, n), positives=(f"d{n}",), negatives=(f"d{n + NUM_QUERIES}",))
        for n in range(NUM_QUERIES)
    ]
    return RetrievalTask(dataset="mixed", task="it2it", split="train", queries=queries, candidates=candidates)


def embedder(checkpoint: Path, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> tuple[Any, PromptEncoder]:
    """A model to train and what makes its inputs."""
    backbone, processor = load_backbone(checkpoint, dtype=dtype)
    backbone.set_attn_implementation("eager")
    for name, module in backbone.named_modules():
        if name.endswith("self_attn"):
            module.attention_dropout = dropout
    pictures = Pictures(processor.image_processor, AugmentRecipe())
    return PromptEmbedder(backbone), PromptEncoder(InputFormatter(processor, load_settings(checkpoint)), pictures)


def trainer(checkpoint: Path, task: RetrievalTask, folder: Path, **loss: Any) -> Any:
    """A trainer whose ``training_step`` can be called, on all the task's queries at once."""
    model, encode = embedder(checkpoint)
    values = {"batch_size": NUM_QUERIES, "num_negatives": 1, "temperature": 0.1, "symmetric": True}
    recipe = ContrastRecipe(**(values | loss))
    sampler = BatchSampler(
        TaskMixture(tasks=[task]), batch_size=recipe.batch_size, num_negatives=recipe.num_negatives, seed=0
    )
    one = ContrastiveTrainer(
        model=model,
        args=optimizer().arguments(folder, seed=0),
        train_dataset=[{"step": n} for n in range(8)],
        steps=ContrastiveSteps(sampler, encode, seed=0, chunk_tokens=recipe.chunk_tokens),
        recipe=recipe,
        validation=[],
    )
    one.current_gradient_accumulation_steps = 1
    one.state.max_steps = 8
    return one


def step(one: Any, number: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step, and the gradients that it leaves."""
    one.model.zero_grad()
    torch.manual_seed(7)
    loss = one.training_step(one.model, {"step": number})
    return loss.item(), {name: w.grad for name, w in one.model.named_parameters() if w.grad is not None}
