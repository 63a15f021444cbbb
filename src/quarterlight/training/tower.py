"""A good start for a vision tower: structured attention, then imitation of a teacher's feature maps.

Legend of shapes: T tiles, N patches of a tile, D columns of the tower, G side of the patch grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

from quarterlight.errors import RecipeError
from quarterlight.models.compression import compress
from quarterlight.records import Item
from quarterlight.training.augment import draw
from quarterlight.training.collate import Pictures
from quarterlight.training.distributed import world_size
from quarterlight.training.optimizer import OptimizerRecipe, last_checkpoint, tensorboard
from quarterlight.training.teacher import Teacher

_NEIGHBOURS = [(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)]


@dataclass(frozen=True, kw_only=True)
class TowerRecipe:
    """What imitation does beyond its optimiser."""

    batch_size: int = 192
    """pictures of a batch on each device"""
    middle_layer: int = 4
    """the layer, counted from 1, whose patches imitate the map at an eighth of the side"""


@torch.no_grad()
def structure_attention(tower: InternVLVisionModel, *, position_columns: int, strength: float = 1.6) -> None:
    """Starts a random tower as a stack of convolutions: each head looks at one fixed neighbour of a patch.

    The last ``position_columns`` (P, a multiple of 4) columns of the position embeddings become cosines and sines of
    x and y at P/4 frequencies.  A head's keys copy them and its queries copy them turned by the head's offset, so that
    the score between patches p and q is a sum of cosines of (q - p - offset), highest where the offset leads.  Training
    is free to change all of it.  Heads take the nine offsets of a 3 x 3 window in turn; ``strength`` scales queries and
    keys, and so sets how sharply a head looks.
    """
    config = tower.config
    if position_columns % 4 or not 0 < position_columns < config.hidden_size:
        raise RecipeError(
            f"position_columns must be a multiple of 4 below the tower's width {config.hidden_size}, "
            f"got {position_columns}."
        )
    D, heads = config.hidden_size, config.num_attention_heads
    grid = config.image_size[0] // config.patch_size[0]
    count, width, first = position_columns // 4, D // heads // 4, D - position_columns
    frequency = math.pi / 16 * torch.arange(1, count + 1)
    y_N, x_N = (one.flatten().float() for one in torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij"))
    positions = [f(axis_N[:, None] * frequency) for axis_N in (x_N, y_N) for f in (torch.cos, torch.sin)]
    embeddings = tower.embeddings
    embeddings.position_embeddings.zero_()
    embeddings.position_embeddings[0, 1:, first:] = torch.cat(positions, dim=1)
    embeddings.patch_embeddings.projection.weight[first:] *= 0.05  # leaves those columns to the position at first
    used = torch.linspace(0, count - 1, width).long()
    turn = 0
    for number, layer in enumerate(tower.encoder.layer):
        query, key = (torch.zeros(D, D) for _ in range(2))
        for head in range(heads):
            offset = _NEIGHBOURS[(2 * turn + 1) % 9]
            turn += 1
            for axis in (0, 1):
                angle = offset[axis] * frequency[used]
                rows = head * (D // heads) + 2 * axis * width + torch.arange(width)
                cosine = first + 2 * axis * count + used
                sine = cosine + count
                key[rows, cosine], key[rows + width, sine] = 1.0, 1.0
                query[rows, cosine], query[rows, sine] = angle.cos(), -angle.sin()
                query[rows + width, sine], query[rows + width, cosine] = angle.cos(), angle.sin()
        sharpness = strength if number < len(tower.encoder.layer) * 2 // 3 else strength / 2
        attention = layer.attention
        attention.q_proj.weight.copy_(sharpness * query + 0.02 * torch.randn(D, D))
        attention.k_proj.weight.copy_(sharpness * key + 0.02 * torch.randn(D, D))
        attention.v_proj.weight.normal_(0, D**-0.5)
        attention.projection_layer.weight.normal_(0, D**-0.5 / 2)


class _Imitation(nn.Module):
    """The tower with linear heads that turn its patches into the teacher's maps and embedding."""

    def __init__(self, tower: InternVLVisionModel, teacher: Teacher, recipe: TowerRecipe) -> None:
        super().__init__()
        D = tower.config.hidden_size
        self.tower = tower
        self.middle_layer = recipe.middle_layer
        second, third = teacher.sixteenth.short_cut[0].in_channels, teacher.sixteenth.short_cut[0].out_channels
        self.eighth = nn.Linear(D, second)
        self.sixteenth = nn.Linear(D, third)
        self.picture = nn.Linear(4 * D, teacher.picture.out_features)
        self._teacher = [teacher.eval().requires_grad_(False)]  # in a list: not among our parameters

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """The sum of the mean squared errors, each in units of its target's variance."""
        (teacher,) = self._teacher
        with torch.no_grad():
            eighth, sixteenth = teacher.feature_maps(pixel_values)
            targets = [one.float() for one in (eighth, sixteenth, teacher.embed_pictures(sixteenth))]
            targets = [one - one.mean(dim=(0, *range(2, one.ndim)), keepdim=True) for one in targets]
        hidden = self.tower.embeddings(pixel_values)
        for number, layer in enumerate(self.tower.encoder.layer, start=1):
            hidden = layer(hidden)
            if number == self.middle_layer:
                middle = hidden[:, 1:]
        grid = math.isqrt(hidden.shape[1] - 1)
        last = self.tower.layernorm(hidden)[:, 1:].reshape(len(hidden), grid, grid, -1)
        half = compress(last, 2)
        quarter = F.adaptive_avg_pool2d(half.movedim(-1, 1), 2).flatten(1)
        guesses = [
            self.eighth(middle).transpose(1, 2).reshape_as(targets[0]),
            self.sixteenth(half).movedim(-1, 1),
            self.picture(quarter),
        ]
        losses = [
            F.mse_loss(guess.float(), target) / target.var() for guess, target in zip(guesses, targets, strict=True)
        ]
        loss = torch.stack(losses).sum()
        if not torch.isfinite(loss):
            raise RecipeError(
                "The loss of the tower stage is not finite: lower its learning rate. Its last checkpoint is kept."
            )
        return {"loss": loss}


class _TileSteps(Dataset[Tensor]):
    """Random tiles by step."""

    def __init__(self, items: Sequence[Item], pictures: Pictures, batch_size: int, num_steps: int, seed: int) -> None:
        self.items, self.pictures, self.batch_size, self.num_steps, self.seed = (
            items,
            pictures,
            batch_size,
            num_steps,
            seed,
        )

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Tensor:
        chosen = np.random.default_rng((self.seed, step)).integers(len(self.items), size=self.batch_size)
        tiles_THW3, counts = self.pictures.tiles([self.items[index] for index in chosen])
        return self.pictures.pixel_values(tiles_THW3, counts, draw(self.batch_size, seed=self.seed, step=step))


def imitate(
    tower: InternVLVisionModel,
    teacher: Teacher,
    *,
    items: Sequence[Item],
    pictures: Pictures,
    recipe: TowerRecipe,
    optimizer: OptimizerRecipe,
    folder: Path,
    seed: int,
) -> None:
    """Trains ``tower`` in place to give linear images of the teacher's feature maps of the items' pictures.

    Teacher and tower see the same augmented tiles.  Resumes from ``folder`` if a run was stopped there.
    """

    def collate(batches: list[Tensor]) -> dict[str, Any]:
        return {"pixel_values": batches[0]}

    vision = tower.config
    if not 1 <= recipe.middle_layer <= vision.num_hidden_layers or vision.patch_size[0] != 8:
        raise RecipeError(
            f"Imitation needs patches of 8 pixels, the stride of the teacher's map, and a middle_layer from 1 to "
            f"{vision.num_hidden_layers}; got patches of {vision.patch_size[0]} and middle_layer {recipe.middle_layer}."
        )
    batches = optimizer.gradient_accumulation_steps * world_size()  # of a step
    num_steps = optimizer.steps(len(items), recipe.batch_size * batches)
    arguments = optimizer.arguments(folder, seed=seed, num_steps=num_steps)
    trainer = Trainer(
        model=_Imitation(tower, teacher.to(arguments.device), recipe),
        args=arguments,
        # the loader deals them out to the processes
        train_dataset=_TileSteps(items, pictures, recipe.batch_size, num_steps * batches, seed),
        data_collator=collate,
        callbacks=[tensorboard(folder)],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
