"""What `index` and `embed` store for a picture file is what the model makes of that file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.models.qwen import plain_qwen

from quarterlight.images import load_image
from quarterlight.index import IndexStore
from quarterlight.index.rows import path_of
from quarterlight.index.shards import ShardFolder
from quarterlight.models.checkpoint import load_backbone, save_checkpoint
from quarterlight.models.embedder import Embedder
from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig
from quarterlight.models.internvl_vtc.modeling import InternVLVTCModel
from quarterlight.models.internvl_vtc.processing import InternVLVTCImageProcessor, InternVLVTCProcessor
from quarterlight.models.settings import EmbedderSettings
from quarterlight.records import Item
from quarterlight.search.documents import thumbnail
from quarterlight.search.embed import Local, embed
from quarterlight.search.encoder import identity_of
from quarterlight.search.ingest import ingest

LINES: tuple[dict[str, Any], ...] = (
    {"id": "of the checkpoint", "image": "scan.png"},
    {"id": "twelve", "image": "scan.png", "max_tiles": 12},
    {"id": "wide", "image": "photo.jpg", "max_tiles": 1},
    {"id": "both", "image": ["photo.jpg", "small.png"], "text": "two"},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradients behind a fine grid, which tells ways of shrinking apart."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, (width, height) in {"scan.png": (1800, 1800), "photo.jpg": (3000, 2000), "small.png": (90, 70)}.items():
        y, x = np.ogrid[:height, :width]
        colours = np.broadcast_arrays(x * 255 // width, y * 255 // height, 255 * ((x % 7 == 0) | (y % 5 == 0)))
        Image.fromarray(np.stack(colours, axis=-1).astype(np.uint8)).save(folder / name)
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    return folder


@pytest.fixture(scope="module", params=["448 px", "64 px", "64 px, decode_margin", "Qwen-VL"])
def embedder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Embedder:
    """The first cuts pictures into four tiles when nobody says, and has large patches, so that it is fast."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    match request.param:
        case "448 px":
            torch.manual_seed(0)
            values = request.getfixturevalue("tiny_values")
            vision = {**values["vision_config"], "image_size": [448, 448], "patch_size": [56, 56]}
            config = InternVLVTCConfig(**{**values, "vision_config": vision}, visual_token_compression=2)
            eyes = InternVLVTCImageProcessor(size={"height": 448, "width": 448}, max_patches=4)
            processor = InternVLVTCProcessor(eyes, tokenizer, image_seq_length=config.image_seq_length)
            settings = EmbedderSettings(text_max_tokens=64, max_tiles=4)
            target = tmp_path_factory.mktemp("models") / "large"
            return Embedder(save_checkpoint(target, InternVLVTCModel(config), processor, settings), **options)
        case "Qwen-VL":
            model, reader = load_backbone(plain_qwen("qwen2_5_vl", tmp_path_factory.mktemp("qwen") / "tiny", tokenizer))
            few_pixels = EmbedderSettings(text_max_tokens=64, max_pixels=100 * 64)
            return Embedder.from_model(model.eval(), reader, few_pixels)
        case name:
            margin = 4 if name.endswith("decode_margin") else None
            return Embedder(request.getfixturevalue("tiny_checkpoint"), decode_margin=margin, **options)


def test_index_stores_what_the_model_makes_of_the_file(embedder: Embedder, folder: Path, tmp_path: Path) -> None:
    store = IndexStore.create(tmp_path / "index", identity_of(embedder))
    assert ingest([folder], store, embedder).new == 3
    rows, vectors = store.rows(set(store.files()))
    direct = embedder.encode_document([Item(image=path_of(row.uri), max_tiles=1) for row in rows])
    np.testing.assert_allclose(vectors, direct, atol=1e-5)
    for row in rows:  # whatever of the picture the model is given
        image = load_image(path_of(row.uri), reduce_to=448)
        shown = load_image(row.thumbnail)
        assert shown.size == load_image(thumbnail(image)).size
        difference = np.asarray(shown, np.float32) - np.asarray(load_image(thumbnail(image)), np.float32)
        assert np.abs(difference).mean() < (0.001 if row.uri.endswith("png") else 3)


def test_lists_store_what_the_model_makes_of_their_items(embedder: Embedder, folder: Path, tmp_path: Path) -> None:
    shards = ShardFolder.create(tmp_path / "out", identity_of(embedder))
    embed([folder / "list.jsonl"], shards, Local(embedder))
    ((rows, vectors),) = (shards.read(info) for info in shards.shards())
    stored = {row.title: vector for row, vector in zip(rows, vectors, strict=True)}
    items = []
    for line in LINES:
        names = [line["image"]] if isinstance(line["image"], str) else line["image"]
        files = [folder / name for name in names]
        items.append(Item(image=files, text=line.get("text"), max_tiles=line.get("max_tiles")))
    direct = embedder.encode_document(items)
    np.testing.assert_allclose([stored[line["id"]] for line in LINES], direct, atol=1e-5)
