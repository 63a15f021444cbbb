"""Qwen-VL against plain transformers: the same numbers at s = 1, independent pooling at s = 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.models.qwen import QWEN, plain_qwen
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from quarterlight.errors import CheckpointError, ImageError, InputError
from quarterlight.images import load_image
from quarterlight.index.visual_tokens import PRECISIONS, VisualTokenStore
from quarterlight.models.backbones import backbone_named, backbone_of
from quarterlight.models.checkpoint import load_backbone, load_config, load_settings, save_checkpoint, save_reranker
from quarterlight.models.compression import compress_grid, compressed_grid
from quarterlight.models.embedder import Embedder
from quarterlight.models.inputs import InputFormatter, TokenizedPrompt
from quarterlight.models.pair import load_pair, save_pair
from quarterlight.models.positions import Positions
from quarterlight.models.qwen_vtc import Qwen2VLVTCConfig, QwenVTCImageProcessor, QwenVTCProcessor
from quarterlight.models.reranker import Reranker
from quarterlight.models.settings import EmbedderSettings, RerankerSettings
from quarterlight.records import Item
from quarterlight.training.lora import LoraRecipe, add_lora

Pictures = Callable[..., Image.Image]


@pytest.fixture(scope="module", params=QWEN)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return plain_qwen(request.param, tmp_path_factory.mktemp("qwen") / request.param, tokenizer)


@pytest.fixture
def items(picture: Pictures) -> list[Any]:
    return [
        "a red apple",
        picture(0, 40, 24),  # 3 x 5 tiles of 8 pixels
        {"text": "the same, but blue", "image": picture(1, 32, 48)},
        {"image": [picture(2, 30, 20), picture(3, 16, 60)]},
        Item(image=picture(4, 90, 70), max_tiles=2),
        "x",
    ]


def batch_for_theirs(processor: Any, picture: Image.Image, grid: tuple[int, int], factor: int) -> dict[str, Any]:
    """One row with a picture between words, as transformers' models take it."""
    tiles = processor.image_processor.cut(picture, max_pixels=grid[0] * grid[1] * 64)
    assert tiles.grid == grid
    rows, columns = max(1, grid[0] // factor), max(1, grid[1] // factor)
    ids = [7, 8, *[processor.image_token_id] * (rows * columns), 9, 10]
    input_ids = torch.tensor([ids])
    return {
        "input_ids": input_ids,
        "mm_token_type_ids": (input_ids == processor.image_token_id).int(),
        "image_grid_thw": torch.tensor([[1, 2 * grid[0], 2 * grid[1]]]),
        "pixel_values": processor.image_processor.normalize_tiles(torch.from_numpy(tiles.pixels)),
    }


@torch.inference_mode()
def test_s1_is_bit_identical_to_plain_qwen(plain: Path, picture: Pictures) -> None:
    theirs = AutoModelForImageTextToText.from_pretrained(plain).eval()
    ours, processor = load_backbone(plain, visual_token_compression=1, language_head=True)
    assert type(ours) is not type(theirs)
    assert isinstance(processor, QwenVTCProcessor)
    batch = batch_for_theirs(processor, picture(0, 40, 24), (3, 5), 1)
    assert torch.equal(ours(**batch).logits, theirs(**batch).logits)


def test_pictures_become_what_transformers_makes_of_them(plain: Path, picture: Pictures) -> None:
    ours = QwenVTCProcessor.from_pretrained(plain).image_processor
    theirs = Qwen2VLImageProcessorPil.from_pretrained(plain)
    pictures = [picture(1, 40, 24), picture(2, 90, 200), picture(3, 7, 9), picture(4, 64, 64)]
    expected = theirs(pictures, return_tensors="pt")
    found = ours(pictures)
    assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 4), (5, 1)])
def test_compression_equals_independent_pooling(plain: Path, picture: Pictures, grid: tuple[int, int]) -> None:
    theirs = AutoModelForImageTextToText.from_pretrained(plain).eval()
    ours, processor = load_backbone(plain, visual_token_compression=2)
    batch = batch_for_theirs(processor, picture(0, 8 * grid[1], 8 * grid[0]), grid, 2)
    pixels, grid_thw = batch["pixel_values"], batch["image_grid_thw"]
    full = theirs.get_image_features(pixels, grid_thw, return_dict=True)
    small = ours.get_image_features(pixels, grid_thw, return_dict=True)

    def pooled(features: torch.Tensor) -> torch.Tensor:
        """Samples between rows and columns, in NumPy."""
        values = features.reshape(*grid, -1).numpy().astype(np.float64)
        for axis, length in enumerate(grid):
            kept = max(1, length // 2)
            centres = np.clip((np.arange(kept) + 0.5) * length / kept - 0.5, 0, length - 1)
            low = np.floor(centres).astype(int)
            share = (centres - low).reshape([-1 if n == axis else 1 for n in range(3)])
            high = np.minimum(low + 1, length - 1)
            values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
        return torch.from_numpy(values.reshape(-1, values.shape[-1])).float()

    torch.testing.assert_close(small.pooler_output[0], pooled(full.pooler_output[0]), rtol=0, atol=1e-5)
    for mine, yours in zip(
        getattr(small, "deepstack_features", []), getattr(full, "deepstack_features", []), strict=True
    ):
        torch.testing.assert_close(mine[0], pooled(yours[0]), rtol=0, atol=1e-5)
    assert ours(**batch).last_hidden_state.isfinite().all()  # as many placeholders as features
    expected, _ = theirs.model.get_rope_index(
        batch["input_ids"],
        batch["mm_token_type_ids"],
        image_grid_thw=torch.tensor([[1, 2 * max(1, grid[0] // 2), 2 * max(1, grid[1] // 2)]]),
    )
    own = processor.positions(batch["input_ids"][0].tolist(), [grid], Positions.MROPE)
    assert torch.equal(own, expected[:, 0])
    assert torch.equal(
        ours.get_rope_index(batch["input_ids"], batch["mm_token_type_ids"], image_grid_thw=grid_thw)[0], expected
    )


def test_even_grids_are_means() -> None:
    features = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    means = F.avg_pool2d(features.movedim(-1, 0), 2).movedim(0, -1)
    assert torch.equal(compress_grid(features, 2), features.reshape(2, 2, 3, 2, 3).mean((1, 3)))
    torch.testing.assert_close(compress_grid(features, 2), means, rtol=0, atol=1e-6)
    assert compress_grid(features, 1) is features
    assert compress_grid(features.bfloat16()[:3], 2).dtype == torch.bfloat16
    assert compressed_grid(1, 7, 2) == (1, 3)


@torch.inference_mode()
def test_embedder_gives_what_transformers_computes(plain: Path, items: list[Any]) -> None:
    """Token ids, positions, pictures and pooling against a plain model that works these out itself."""
    embedder = Embedder(plain, dtype=torch.float32, device="cpu", num_workers=0)
    theirs = AutoModelForImageTextToText.from_pretrained(plain).eval().model
    formatter = InputFormatter(embedder.processor, embedder.settings)
    found = embedder.encode_query(items)
    for item, row in zip(items, found, strict=True):
        inputs = formatter([item], "query")
        more = {}
        if "grids" in inputs:
            pairs = 2 * inputs["grids"]
            more = {
                "pixel_values": inputs["pixel_values"],
                "image_grid_thw": torch.cat([torch.ones_like(pairs[:, :1]), pairs], 1),
            }
        types = (inputs["input_ids"] == embedder.processor.image_token_id).int()
        theirs.rope_deltas = None
        hidden = theirs(input_ids=inputs["input_ids"], mm_token_type_ids=types, **more).last_hidden_state
        np.testing.assert_allclose(row, F.normalize(hidden[0, -1], dim=0).numpy(), atol=1e-5)


def test_compression_costs_a_quarter(plain: Path, picture: Pictures) -> None:
    item = Item(image=picture(0, 64, 48))
    counts = {}
    for factor in (1, 2):
        embedder = Embedder(plain, visual_token_compression=factor, dtype=torch.float32, device="cpu")
        inputs = InputFormatter(embedder.processor, embedder.settings)([item], "document")
        counts[factor] = int((inputs["input_ids"] == embedder.processor.image_token_id).sum())
        assert embedder.encode_document([item]).shape == (1, 32)
    assert counts == {1: 48, 2: 12}


def test_pages_have_so_many_times_the_pixels(plain: Path, picture: Pictures) -> None:
    processor = QwenVTCProcessor.from_pretrained(plain)
    formatter = InputFormatter(processor, EmbedderSettings(max_pixels=12 * 64))
    (small,), (page,) = (formatter.tiles(Item(image=picture(0, 200, 150), max_tiles=most)) for most in (1, 4))
    assert (small.grid, page.grid) == ((3, 4), (6, 8))
    assert small.pixels.shape == (12, 8, 8, 3)
    assert formatter.most_tiles(4) == 48


def test_limits_of_pictures(plain: Path, picture: Pictures) -> None:
    processor: QwenVTCImageProcessor = QwenVTCProcessor.from_pretrained(plain).image_processor
    assert processor.grid_of(400, 2) == (1, 29)  # 200 times as wide as high: transformers' rounding, within the limit
    assert processor.grid_of(1990, 10, max_pixels=6 * 64) == (1, 6)  # transformers would make 14 tiles of it
    assert processor.grid_of(10, 1990, max_pixels=6 * 64) == (6, 1)
    assert processor.grid_of(3, 3) == (2, 2)  # at least four tiles, as preprocessor_config.json says
    with pytest.raises(ImageError, match="one side may be 200 times the other"):
        processor.cut(Image.new("RGB", (402, 2)))


def test_embedder_names_a_picture_it_cannot_read(plain: Path) -> None:
    embedder = Embedder(plain, dtype=torch.float32, device="cpu")
    with pytest.raises(ImageError, match=r"Item 1: .* one side may be"):
        embedder.encode_document(["x", Image.new("RGB", (900, 2))])


@pytest.mark.parametrize("positions", list(Positions))
def test_saved_is_reloaded_is_sentence_transformers(
    plain: Path, tmp_path: Path, items: list[Any], positions: Positions
) -> None:
    from sentence_transformers import SentenceTransformer

    model, processor = load_backbone(plain, visual_token_compression=2)
    settings = EmbedderSettings(max_pixels=30 * 64, positions=positions)
    saved = save_checkpoint(tmp_path / "saved", model, processor, settings)
    memory = Embedder.from_model(model, processor, settings, folder=saved)
    loaded = Embedder(saved, dtype=torch.float32, device="cpu")
    assert loaded.settings == settings == load_settings(saved)
    assert loaded.model_hash == memory.model_hash
    assert load_config(saved).positions == positions
    expected = memory.encode_document(items)
    np.testing.assert_array_equal(loaded.encode_document(items), expected)
    opened = SentenceTransformer(str(saved), device="cpu", model_kwargs={"dtype": torch.float32})
    simple = [items[0], items[1], items[2], items[5]]  # without several pictures or an own limit
    found = opened.encode_document(simple, batch_size=2)
    np.testing.assert_allclose(found, loaded.encode_document(simple), atol=1e-5)


def test_positions_matter_and_are_one_line_of_numbers(plain: Path, items: list[Any]) -> None:
    model, processor = load_backbone(plain)
    rows = {
        mode: Embedder.from_model(model, processor, EmbedderSettings(positions=mode)).encode_document(items[:3])
        for mode in Positions
    }
    np.testing.assert_allclose(rows[Positions.MROPE][0], rows[Positions.SEQUENTIAL][0], atol=1e-6)  # a text
    assert np.abs(rows[Positions.MROPE][1] - rows[Positions.SEQUENTIAL][1]).max() > 1e-3
    sequential = processor.positions([7, processor.image_token_id, 8], [(1, 1)], Positions.SEQUENTIAL, start=4)
    assert sequential.tolist() == [[4, 5, 6]] * 3


def test_lora_stays_out_of_the_vision_tower(plain: Path) -> None:
    model, _ = load_backbone(plain)
    add_lora(model, LoraRecipe(rank=2), seed=0)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all(name.startswith("language_model.layers.") and ".lora_" in name for name in trained)
    assert all(
        not weight.requires_grad for part in backbone_of(model.config).parts(model) for weight in part.parameters()
    )


def test_flat_configurations_of_the_hub_load(tmp_path: Path, tokenizer: Any, items: list[Any]) -> None:
    """Published Qwen2-VL folders have the language model's settings beside the others."""
    folder = plain_qwen("qwen2_vl", tmp_path, tokenizer)
    expected = Embedder(folder, dtype=torch.float32, device="cpu").encode_document(items)
    file = folder / "config.json"
    content = json.loads(file.read_text())
    text = content.pop("text_config")
    scaling = text.pop("rope_parameters")
    text |= {"rope_theta": scaling["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}
    file.write_text(json.dumps({**text, **content}))
    np.testing.assert_array_equal(Embedder(folder, dtype=torch.float32, device="cpu").encode_document(items), expected)


def test_disagreements_are_errors(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must be one of \(1, 2\), got 4"):
        load_config(plain, 4)
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((plain / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"patch_size": 14}))
    with pytest.raises(CheckpointError, match=r"patches of 14 pixels.*mend preprocessor_config\.json"):
        load_backbone(tmp_path)


def test_auto_classes_know_all_families(tmp_path: Path, tokenizer: Any) -> None:
    """Where quarterlight is imported before transformers as well as after."""
    lines = ["import quarterlight, transformers", "from transformers import AutoConfig, AutoModel, AutoProcessor"]
    for family in QWEN:
        model, processor = load_backbone(plain_qwen(family, tmp_path / family, tokenizer), visual_token_compression=2)
        folder = str(save_checkpoint(tmp_path / f"{family}_saved", model, processor, EmbedderSettings()))
        assert type(AutoProcessor.from_pretrained(folder)) is QwenVTCProcessor
        lines += [
            f"assert type(AutoModel.from_pretrained({folder!r})).__name__ == {type(model).__name__!r}",
            f"processor = AutoProcessor.from_pretrained({folder!r})",
            "assert type(processor).__name__ == 'QwenVTCProcessor', processor",
            "assert type(processor.image_processor).__name__ == 'QwenVTCImageProcessor'",
            "assert processor.visual_token_compression == 2",
        ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=300)


def test_reranker_equals_full_prompts(plain: Path, tmp_path: Path, items: list[Any]) -> None:
    """Shared prefixes, visual tokens worked out once and M-RoPE's positions, against one plain pass for each prompt."""
    model, processor = load_backbone(plain, visual_token_compression=2, language_head=True)
    saved = save_reranker(tmp_path / "saved", model, processor, RerankerSettings(max_pixels=30 * 64))
    reranker = Reranker(saved, dtype=torch.float32, device="cpu", tokens_per_batch=200)
    formatter = reranker.formatter
    candidates = [Item.parse(item) for item in items]
    for query in (candidates[0], candidates[2], Item(image=items[1], text="not this")):
        for listwise in (False, True):
            expected: list[float] = []
            for row in [candidates] if listwise else [[one] for one in candidates]:
                tail = formatter.list_tail(row) if listwise else formatter.tails(row)[0]
                prompt = TokenizedPrompt(formatter.prefix(query, listwise=listwise).runs + tail.runs)
                shown = [
                    processor.image_processor.cut(load_image(source), one.max_tiles, 30 * 64)
                    for one in (query, *row)
                    for source in one.images
                ]
                ids, _ = formatter.tokenize.expand(prompt, [one.grid for one in shown])
                inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
                if shown:
                    pixels = torch.from_numpy(np.concatenate([one.pixels for one in shown]))
                    inputs["pixel_values"] = processor.image_processor.normalize_tiles(pixels)
                    inputs["image_grid_thw"] = torch.tensor([(1, 2 * one.grid[0], 2 * one.grid[1]) for one in shown])
                    inputs["mm_token_type_ids"] = (inputs["input_ids"] == processor.image_token_id).int()
                with torch.inference_mode():
                    reranker.model.model.rope_deltas = None
                    logits = reranker.model(**inputs).logits[0, -1]
                words = (
                    reranker.answers.numbers[: len(row)] if listwise else (reranker.answers.yes, reranker.answers.no)
                )
                scores = logits[list(words)].softmax(0).tolist()
                expected += scores if listwise else scores[:1]
            if listwise:
                found = {one["corpus_id"]: one["score"] for one in reranker.rank_listwise(query, candidates)}
                np.testing.assert_allclose([found[n] for n in range(len(candidates))], expected, atol=1e-5)
            else:
                np.testing.assert_allclose(reranker.score(query, candidates), expected, atol=1e-5)
            assert np.ptp(expected) > 1e-3


def test_stored_visual_tokens_stand_in_for_pictures(plain: Path, tmp_path: Path, items: list[Any]) -> None:
    model, processor = load_backbone(plain, visual_token_compression=2, language_head=True)
    embedder = Embedder.from_model(model, processor, EmbedderSettings())
    reranker = Reranker.from_model(model, processor, RerankerSettings())
    chosen = [items[0], items[1], items[4]]
    rows, tokens = embedder.encode_document_with_visual_tokens(chosen)
    np.testing.assert_allclose(rows, embedder.encode_document(chosen), atol=1e-6)
    assert tokens[0] is None and tokens[1] is not None and tokens[1].dtype == np.float16
    names = ["a red apple", *(Item(image=tmp_path / "gone.png", max_tiles=most) for most in (1, 2))]  # not looked at
    expected = reranker.score("x", chosen)
    for precision in PRECISIONS:
        store = VisualTokenStore.create(tmp_path / "store", "ab" * 32, precision)
        store.add({f"{precision}{n}": one for n, one in enumerate(tokens) if one is not None})
        found = store.get({f"{precision}1", f"{precision}2"})
        stored = [None, found[f"{precision}1"], found[f"{precision}2"]]
        scores = reranker.score("x", names, visual_tokens=stored)
        np.testing.assert_allclose(scores, expected, atol={"float16": 2e-3, "int8": 5e-2}[precision])
    with pytest.raises(InputError, match=r"Candidate 0: visual_tokens must be of shape \[1 \+ tokens"):
        reranker.score("x", [items[1]], visual_tokens=[np.zeros((15, 33), np.float16)])


@pytest.mark.parametrize("grid", [(1, 300), (300, 1), (15, 20), (7, 7), (40, 30)])
def test_shapes_of_stored_tokens_survive_rounding(grid: tuple[int, int]) -> None:
    backbone = backbone_named("qwen2_vl_vtc")
    config = Qwen2VLVTCConfig(text_config={"hidden_size": 8, "num_hidden_layers": 1}, visual_token_compression=2)
    count = backbone.num_rows(config, grid)
    stored = backbone.stored(config, torch.zeros(count, 1, 8), grid)
    scale = stored.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
    _, found = backbone.restored(config, (stored / scale).round() * scale)
    assert compressed_grid(*found, 2) == compressed_grid(*grid, 2)


def test_a_pair_shares_its_eyes(plain: Path, tmp_path: Path, items: list[Any]) -> None:
    model, processor = load_backbone(plain, visual_token_compression=2, language_head=True)
    embedder = save_checkpoint(tmp_path / "embedder", model, processor, EmbedderSettings())
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.add_(0.1)
    reranker = save_reranker(tmp_path / "reranker", model, processor, RerankerSettings())
    first, second = load_pair(save_pair(tmp_path / "pair", embedder, reranker), dtype=torch.float32, device="cpu")
    assert first.vision_hash == second.vision_hash
    alone = Embedder(embedder, dtype=torch.float32, device="cpu"), Reranker(reranker, dtype=torch.float32, device="cpu")
    np.testing.assert_array_equal(first.encode_query(items), alone[0].encode_query(items))
    np.testing.assert_allclose(second.score("x", items[:3]), alone[1].score("x", items[:3]), atol=1e-6)
    with torch.no_grad():
        model.model.visual.patch_embed.proj.weight.add_(0.1)
    other = save_reranker(tmp_path / "other", model, processor, RerankerSettings())
    with pytest.raises(CheckpointError, match="differ in vision tower"):
        save_pair(tmp_path / "none", embedder, other)


def test_cross_encoder_gives_the_same_scores(plain: Path, tmp_path: Path, items: list[Any]) -> None:
    from sentence_transformers import CrossEncoder

    model, processor = load_backbone(plain, visual_token_compression=2, language_head=True)
    saved = save_reranker(tmp_path / "saved", model, processor, RerankerSettings(max_pixels=30 * 64))
    opened = CrossEncoder(str(saved), device="cpu", model_kwargs={"dtype": torch.float32})
    simple = [items[0], items[1], items[2], items[5]]  # without several pictures or an own limit
    pairs = [(query, candidate) for query in (items[0], items[2]) for candidate in simple]
    found = opened.predict(pairs, batch_size=3)
    ours = Reranker(saved, dtype=torch.float32, device="cpu")
    np.testing.assert_allclose(found, ours.predict(pairs), atol=1e-5)
