"""U-MARVEL's stages on other backbones than nano's, and on weights that others released, in a step each."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.qwen import plain_qwen
from tests.test_pipeline import DATA

from quarterlight.errors import CheckpointError, RecipeError
from quarterlight.mining.teaching import read_taught
from quarterlight.models import presets
from quarterlight.models.checkpoint import load_settings, load_temperature
from quarterlight.models.embedder import Embedder
from quarterlight.models.pair import load_pair
from quarterlight.models.presets import PRESETS
from quarterlight.models.reranker import Reranker
from quarterlight.models.settings import EmbedderSettings
from quarterlight.pipeline import _Pipeline, run
from quarterlight.prompts import MARKERS
from quarterlight.recipe import Recipe, parse
from quarterlight.records import Item
from quarterlight.training.restore import PackCollator

STEP = {"num_steps": 1, "learning_rate": 1e-3, "warmup_steps": 0, "log_every": 1, "num_workers": 0, "bf16": False}
LORA = {"rank": 2, "alpha": 4}
STYLE = {"pooling": "mean", "attention": "bidirectional", "prompt_style": "u_marvel"}
MIXTURE = [
    {"dataset": "emoji", "task": "t2i", "where": {"lang": "en"}},
    {"dataset": "easy_vqa", "task": "it2t"},
]


def make(model: dict[str, Any], **stages: Any) -> Recipe:
    values = {"name": "tiny", "model": model, "mixture": MIXTURE, "validation": None, **stages}
    return parse(Recipe, values, where="test")


def contrast(**loss: Any) -> dict[str, Any]:
    return {"optimizer": STEP, "loss": {"batch_size": 2, "eval_every": 0, **loss}, "lora": LORA}


def opened(folder: Path) -> Embedder:
    return Embedder(folder, dtype=torch.float32, device="cpu")


def test_qwen_from_captions_to_distillation(
    tmp_path: Path, tokenizer: Any, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = plain_qwen("qwen2_vl", tmp_path / "plain", tokenizer)
    learnt = {"learn_temperature": True, "inherit_temperature": True, "temperature": 0.05}
    rerank = {
        "optimizer": STEP,
        "loss": {"batch_size": 1, "listwise_weight": 0.0, "eval_every": 0, "eval_queries": 0},
        "lora": LORA,
    }
    whole = make(
        {
            "checkpoint": str(plain),
            "attn_implementation": "eager",
            "max_pixels": 6 * 64,
            "text_max_tokens": 40,
            **STYLE,
        },
        caption_pairs=contrast(temperature=0.05, backward_weight=1.0),
        warmup=contrast(sub_batch_size=1, **learnt),
        mine={"depth": 6, "window": None, "sample": 3, "pool": "global", "max_score": 0.999},
        hard_negatives=contrast(num_negatives=2, fill="repeat", **learnt),
        rerank=rerank,
        teach={"depth": 4, "share": 0.1},
        distill={
            "optimizer": STEP,
            "loss": {"batch_size": 1, "eval_every": 0, "max_pixels": 128, **learnt},
            "lora": LORA,
        },
    )
    assert whole.first_model("rerank") is None
    folder = run(whole, DATA, tmp_path / "run", report=lambda _: None)
    embedder = opened(folder)
    settings = embedder.settings
    assert (settings.pooling, settings.attention, settings.prompt_style) == tuple(STYLE.values())
    assert (settings.max_pixels, settings.text_max_tokens) == (6 * 64, 40)
    assert embedder.model.config.visual_token_compression == 2
    assert load_temperature(folder) not in (None, 0.05)
    items: list[Any] = ["a cat", Item(image=picture(0, 40, 24), text="sliced")]
    rows = embedder.encode_query(items, instruction="Find it.")
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1, 1], abs=1e-5)
    before = opened(tmp_path / "run" / "hard_negatives")
    assert np.abs(rows - before.encode_query(items, instruction="Find it.")).max() > 1e-6  # it has learnt
    reranker = Reranker(tmp_path / "run" / "rerank", dtype=torch.float32, device="cpu")
    assert reranker.settings.max_pixels == 6 * 64
    assert whole.distill is not None
    encode = _Pipeline(whole, DATA, tmp_path / "run")._embedding("distill", whole.distill)[3]
    assert encode.pictures.max_pixels == encode.formatter.settings.max_pixels == 128  # in this stage alone
    found = read_taught(
        tmp_path / "run" / "teach", _Pipeline(whole, DATA, tmp_path / "run")._distinct_tasks("teach")[0]
    )
    assert found and all(len(one.dids) == 4 for one in found.values())
    counts = json.loads((tmp_path / "run" / "teach" / "lists.json").read_text())
    assert [one["num_short"] for one in counts] == [0, 0]
    assert "| emoji/t2i | 1 | 4 | 0 | 0 |" in (tmp_path / "run" / "report.md").read_text()

    # U-MARVEL+: another reranker, for what the distilled embedder finds
    plus = make(
        {**asdict(whole.model), "checkpoint": str(folder)},
        retrieve={"depth": 4, "window": None, "sample": None},
        rerank={**rerank, "checkpoint": str(plain)},
    )
    both = run(plus, DATA, tmp_path / "plus", report=lambda _: None)
    pair, _ = load_pair(both, dtype=torch.float32, device="cpu")
    np.testing.assert_array_equal(pair.encode_query(items, instruction="Find it."), rows)
    assert pair.model_hash == embedder.model_hash
    inputs = json.loads((both / "manifest.json").read_text())["inputs_sha256"]
    assert {str(folder), str(plain)} < inputs.keys()
    headless = replace(plus, rerank=replace(plus.rerank, checkpoint=None))
    with pytest.raises(RecipeError, match=r"without the language head .* as rerank\.checkpoint"):
        run(headless, DATA, tmp_path / "headless", report=lambda _: None)
    taught = replace(whole, rerank=replace(whole.rerank, initial="finetune"))
    with pytest.raises(RecipeError, match="no language head of its own"):
        run(taught, DATA, tmp_path / "taught", report=lambda _: None)


def test_internvl_in_the_style_of_u_marvel_opens_everywhere(tmp_path: Path, tiny_checkpoint: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    whole = make(
        {"checkpoint": str(tiny_checkpoint), "attn_implementation": "eager", **STYLE},
        warmup=contrast(learn_temperature=True, chunk_tokens=200),
    )
    folder = run(whole, DATA, tmp_path, report=lambda _: None)
    ours = opened(folder)
    assert ours.settings == replace(
        load_settings(tiny_checkpoint), pooling="mean", attention="bidirectional", prompt_style="u_marvel"
    )
    items = ["a red apple", "a green pear and so on"]
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    np.testing.assert_allclose(theirs.encode_query(items), ours.encode_query(items), rtol=0, atol=1e-5)


@pytest.fixture
def released(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights without a word of how they embed, for which there is a preset."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "U-MARVEL-Tiny"))
    for name in ("quarterlight.json", "modules.json", "chat_template.jinja"):
        (folder / name).unlink()
    preset = replace(PRESETS["u-marvel-qwen2vl-7b"], hub_id="TencentBAC/U-MARVEL-Tiny", model_type="internvl_vtc")
    monkeypatch.setattr(presets, "PRESETS", {**PRESETS, "tiny": replace(preset, marker_seed=5)})
    return folder


def test_released_weights_keep_what_their_folder_leaves_out(released: Path, tmp_path: Path) -> None:
    preset = presets.PRESETS["tiny"]
    stages = {
        "mine": {"depth": 4, "window": None, "sample": 2},
        "hard_negatives": contrast(num_negatives=1),
        "rerank": {"optimizer": STEP, "loss": {"batch_size": 1, "eval_every": 0, "eval_queries": 0}, "lora": LORA},
    }
    model = {"checkpoint": str(released), "attn_implementation": "eager"}
    pipeline = _Pipeline(make(model, **stages), DATA, tmp_path / "run")
    alone = Embedder(released)
    assert pipeline._settings("mine") == pipeline._settings("hard_negatives") == preset.settings == alone.settings
    assert pipeline._finder("mine").model_hash == alone.model_hash
    trained, processor = pipeline._backbone("hard_negatives")
    ids = processor.tokenizer.convert_tokens_to_ids(list(MARKERS))
    rows = trained.get_input_embeddings().weight[ids]
    assert torch.equal(rows, alone.model.get_input_embeddings().weight[ids].float())
    # what the recipe says goes before the preset, in mining too
    said = _Pipeline(make({**model, "text_max_tokens": 9, "system_prompt": ""}, **stages), DATA, tmp_path / "run")
    expected = replace(preset.settings, text_max_tokens=9, system_prompt="")
    assert said._settings("mine") == said._finder("mine").settings == expected
    run(pipeline.recipe, DATA, tmp_path / "run", report=lambda _: None)
    assert load_settings(tmp_path / "run" / "hard_negatives") == preset.settings
    checkpoint_hash = pipeline._checkpoint_hash
    reranker = Reranker(tmp_path / "run" / "rerank")
    assert (reranker.settings.system_prompt, reranker.settings.text_max_tokens) == ("You are a helpful assistant.", 480)
    named = Path(released.rename(released.with_name("0123abcd")))
    unnamed = _Pipeline(make({**model, "checkpoint": str(named)}, **stages), DATA, tmp_path / "other")
    assert unnamed._settings("mine") == EmbedderSettings()
    again = _Pipeline(make({**model, "checkpoint": str(named), "preset": "tiny"}, **stages), DATA, tmp_path / "other")
    assert again._settings("mine") == preset.settings
    assert again._checkpoint_hash == checkpoint_hash != unnamed._checkpoint_hash
    with pytest.raises(RecipeError, match="there is no model"):
        make({"preset": "tiny"})


def test_released_weights_hand_on_their_temperature(released: Path, tmp_path: Path) -> None:
    def begins_with(temperature: torch.Tensor | None, **changes: Any) -> float:
        weights = load_file(released / "model.safetensors")
        weights.pop("sim.temp", None)
        weights |= {} if temperature is None else {"sim.temp": temperature}
        save_file(weights, released / "model.safetensors", metadata={"format": "pt"})
        loss = {"temperature": 0.05, "inherit_temperature": True, "min_temperature": 0.02} | changes
        recipe = make({"checkpoint": str(released)}, warmup=contrast(**loss))
        assert recipe.warmup is not None
        return _Pipeline(recipe, DATA, tmp_path / "run")._loss("warmup", recipe.warmup.loss).temperature

    assert begins_with(None) == 0.05
    assert begins_with(torch.tensor(0.03125)) == begins_with(torch.tensor([0.03125], dtype=torch.bfloat16)) == 0.03125
    assert begins_with(torch.tensor(0.01)) == 0.02, "not below what the recipe allows"
    assert begins_with(torch.tensor(0.03), inherit_temperature=False) == 0.05
    with pytest.raises(CheckpointError, match=r"'sim.temp' of .* one number; it has the shape \[2\]"):
        begins_with(torch.ones(2))


def test_a_checkpoint_is_more_than_its_weights(tiny_checkpoint: Path, tiny_pair: Path, tmp_path: Path) -> None:
    """Settings, temperature, tokenizer and the preparation of pictures are in its hash; how it was made is not."""

    def hashes(change: str | None = None, **values: Any) -> tuple[str, str]:
        one, pair = tmp_path / "one", tmp_path / "pair"
        for source, folder in ((tiny_checkpoint, one), (tiny_pair, pair)):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
        for folder in (one, pair / "reranker"):
            if change is not None:
                content = json.loads((folder / change).read_text())
                for key, value in values.items():
                    content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
                (folder / change).write_text(json.dumps(content))
        teach = {"depth": 3, "reranker": str(pair)}
        distill = {"optimizer": STEP, "loss": {"batch_size": 1}}
        stages = _Pipeline(make({"checkpoint": str(one)}, teach=teach, distill=distill), DATA, tmp_path)
        return stages._checkpoint_hash, stages._teacher_hash

    plain = hashes()
    assert hashes() == plain == hashes("quarterlight.json", manifest={"recipe": 1})
    for change in (
        hashes("quarterlight.json", settings={"text_max_tokens": 9}),
        hashes("quarterlight.json", temperature=0.5),
        hashes("tokenizer.json", version="2.0"),
        hashes("processor_config.json", image_processor={"image_mean": [0, 0, 0]}),
    ):
        assert change[0] != plain[0] and change[1] != plain[1]


def test_stage_1_cuts_and_places_pictures_as_the_model_will(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = plain_qwen("qwen2_vl", tmp_path / "plain", tokenizer)
    seen: list[PackCollator] = []
    made = PackCollator.__init__

    def note(self: PackCollator, *arguments: Any) -> None:
        made(self, *arguments)
        seen.append(self)

    monkeypatch.setattr(PackCollator, "__init__", note)
    restore = {
        "optimizer": STEP,
        "loss": {"max_tokens": 256, "max_tiles": 1, "eval_every": 0},
        "data": [{"dataset": "emoji", "task": "i2t"}],
    }
    model = {"checkpoint": str(plain), "attn_implementation": "eager", "max_pixels": 6 * 64, "positions": "sequential"}
    run(make(model, restore=restore), DATA, tmp_path / "run", report=lambda _: None)
    assert [(one.pictures.max_pixels, one.positions) for one in seen] == [(6 * 64, "sequential")]
