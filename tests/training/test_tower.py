"""Structured attention looks where its offset says; augmentation changes pictures within its bounds."""

from __future__ import annotations

import torch
from transformers import InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

from quarterlight.training.augment import AugmentRecipe, augment, draw
from quarterlight.training.tower import structure_attention


def test_each_head_of_a_new_tower_looks_at_one_neighbour() -> None:
    torch.manual_seed(0)
    config = InternVLVisionConfig(
        hidden_size=96, num_hidden_layers=1, num_attention_heads=3, intermediate_size=96, image_size=64, patch_size=8
    )
    tower = InternVLVisionModel(config).eval()
    structure_attention(tower, position_columns=64, strength=4.0)
    # position columns alone: what the heads see of a tower whose patches are blank
    position_ND = tower.embeddings.position_embeddings[0, 1:]
    layer = tower.encoder.layer[0].attention
    query, key = (projection(position_ND).view(64, 3, 32) for projection in (layer.q_proj, layer.k_proj))
    where_NH = torch.einsum("qhd,khd->qhk", query, key).argmax(dim=2)
    for head, (x, y) in enumerate([(0, -1), (-1, 0), (1, 0)]):  # the odd ones of the nine, in turn
        inner = [(row, column) for row in range(1, 7) for column in range(1, 7)]
        hits = [int(where_NH[8 * row + column, head]) == 8 * (row + y) + column + x for row, column in inner]
        assert sum(hits) > 0.9 * len(hits)


def test_no_change_leaves_pictures_as_they_are() -> None:
    pictures = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    still = AugmentRecipe(scale=0.0, aspect=0.0, rotation=0.0, shift=0.0, contrast=0.0, brightness=0.0)
    torch.testing.assert_close(augment(pictures, still, draw(3, seed=0, step=0)), pictures.float(), atol=1e-3, rtol=0)


def test_augmentation_is_seeded_bounded_and_lets_white_in() -> None:
    pictures = torch.zeros(64, 16, 16, 3, dtype=torch.uint8)
    moved = AugmentRecipe(scale=0.0, aspect=0.0, rotation=0.0, shift=0.25, contrast=0.0, brightness=0.0)
    first, again = (augment(pictures, moved, draw(64, seed=0, step=1)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.min() >= 0 and first.max() <= 255
    white = (first == 255).all(dim=3).float().mean(dim=(1, 2))
    assert 0 < white.mean() < 0.5  # a shift of up to a quarter of each side uncovers at most 7/16 of a picture
    assert white.max() <= 0.5
