"""What a recipe will cost: counted twice where it can be, and against the paper's Table 9."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import InternVLVisionConfig, Qwen2Config
from transformers.models.internvl.modeling_internvl import InternVLVisionLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from quarterlight.data.retrieval import RetrievalDataset
from quarterlight.errors import DatasetError, RecipeError
from quarterlight.models.flops import attention_flop
from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig
from quarterlight.models.internvl_vtc.modeling import InternVLVTCModel
from quarterlight.plan import DEVICES, PAPER_HOURS, StagePlan, find_device, plan
from quarterlight.recipe import Recipe, load_recipe, parse
from quarterlight.training.lora import LoraRecipe, add_lora

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures" / "retrieval"

VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4} | {
    "image_size": 64,
    "patch_size": 8,
}
TEXT = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4} | {
    "num_key_value_heads": 2
}


def make(**changes: Any) -> Recipe:
    """A recipe of a small new model, with a warm-up on 1,000 queries in batches of 10."""
    warmup = {"optimizer": {"num_epochs": 2, "learning_rate": 1e-3}, "loss": {"batch_size": 10}} | changes.pop(
        "warmup", {}
    )
    values: dict[str, Any] = {
        "name": "small",
        "model": {"vision": VISION, "text": TEXT, "vocab_size": 500},
        "mixture": [{"dataset": "d", "task": "t2t", "samples": 1000}],
        "warmup": warmup,
    }
    return parse(Recipe, values | changes, where="test")


def stage(recipe: Recipe, *, devices: int | None = None, device: str = "A800") -> StagePlan:
    return next(one for one in plan(recipe, None, devices, device) if one.stage == "warmup")


@functools.cache
def shipped(name: str, *overrides: str, devices: int | None = None, device: str = "A800") -> dict[str, StagePlan]:
    """The plans of a shipped recipe, by stage."""
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides)
    return {one.stage: one for one in plan(recipe, None, devices, device)}


# ---- work ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "lora", "checkpointing"),
    [("t2t", None, False), ("i2i", None, True), ("t2t", {"dropout": 0.0}, True), ("i2i", {"dropout": 0.0}, False)],
)
def test_work_is_what_pytorch_counts(task: str, lora: dict[str, Any] | None, checkpointing: bool) -> None:
    optimizer = {"num_epochs": 2, "learning_rate": 1e-3, "gradient_checkpointing": checkpointing}
    recipe = make(
        mixture=[{"dataset": "d", "task": task, "samples": 1000}],
        warmup={"optimizer": optimizer, "lora": lora},
    )
    planned = stage(recipe)
    assert planned.steps and planned.batch and planned.flop
    of_one_side = planned.flop / (planned.steps * planned.batch * 2)

    model = InternVLVTCModel(
        InternVLVTCConfig(
            vision_config=InternVLVisionConfig(**VISION),
            text_config=Qwen2Config(**TEXT, vocab_size=500),
            image_token_id=7,
            visual_token_compression=2,
        )
    )
    model.set_attn_implementation("eager")
    if lora is not None:
        add_lora(model, LoraRecipe(**lora), seed=0)
    if checkpointing:
        model.activation_checkpointing_enable()
    ids = torch.full((1, 50), 9) if task == "t2t" else torch.full((1, 20 + model.config.image_seq_length), 9)
    pixels = None
    if task == "i2i":
        ids[0, 3 : 3 + model.config.image_seq_length] = 7
        pixels = torch.randn(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids, pixel_values=pixels).last_hidden_state.sum().backward()
    # eager attention works out both halves of the square, forward and, twice as much, backward
    half = attention_flop(model.config, ids.shape[1]) * (1 + checkpointing + 2)
    # PyTorch leaves out, under LoRA, the gradient of the first layer's input and, of a layer computed again, the
    # last product if nobody asks for what it gives
    tolerance = 0.07 if checkpointing and lora is None else 0.03
    assert of_one_side + half == pytest.approx(counter.get_total_flops(), rel=tolerance)


def test_merging_in_the_tower_is_less_work() -> None:
    def work(checkpoint: str | None, merging: float | None) -> float:
        model = {"vision_token_merging": merging}
        made = {"checkpoint": checkpoint} if checkpoint else {"vision": VISION, "text": TEXT, "vocab_size": 500}
        found = stage(make(model={**model, **made}, mixture=[{"dataset": "d", "task": "i2i", "samples": 1000}])).flop
        assert found
        return found

    for checkpoint in (None, "OpenGVLab/InternVL3-2B-hf"):
        assert 0.5 < work(checkpoint, 0.5) / work(checkpoint, None) < 0.95  # most of the rest is the language model
        assert work(checkpoint, 0.0) == work(checkpoint, None)


def test_a_batch_in_chunks_is_computed_once_more() -> None:
    whole, chunked = (
        stage(make(warmup={"loss": {"batch_size": 10, "chunk_tokens": limit}, "lora": {}})) for limit in (1000, 999)
    )
    assert whole.flop and chunked.flop  # 10 queries and 10 targets of 50 tokens
    assert chunked.flop / whole.flop == pytest.approx(3 / 2, rel=0.03)  # forward twice, backward without weights once
    assert not whole.notes
    assert "computed twice: d/t2t" in chunked.notes[0]


def reranker(**changes: Any) -> StagePlan:
    """The plan of a reranker on 1,000 queries in batches of 10."""
    values = {"optimizer": {"num_epochs": 1, "learning_rate": 1e-3}, "loss": {"batch_size": 10}, "initial": "finetune"}
    mixture = changes.pop("mixture", [{"dataset": "d", "task": "t2t", "samples": 1000}])
    text = TEXT | {"tie_word_embeddings": True}
    recipe = make(model={"vision": VISION, "text": text, "vocab_size": 500}, mixture=mixture, rerank=values | changes)
    return next(one for one in plan(recipe, None, None, "A800") if one.stage == "rerank")


def test_the_work_of_a_reranker_is_what_pytorch_counts() -> None:
    planned = reranker()
    assert planned.steps == 100 and planned.batch == 10 and planned.flop
    pair, many = 70 + 3 * 30, round(70 + 30 + 4.5 * (30 + 4))  # lists have 3 to 6 candidates
    assert planned.tokens == pytest.approx(10 * (pair + many), abs=5)
    model = InternVLVTCModel(
        InternVLVTCConfig(
            vision_config=InternVLVisionConfig(**VISION),
            text_config=Qwen2Config(**TEXT, vocab_size=500),
            image_token_id=7,
            visual_token_compression=2,
        )
    )
    model.set_attn_implementation("eager")
    head = nn.Linear(TEXT["hidden_size"], 500, bias=False)
    with FlopCounterMode(display=False) as counter:
        for length, answers in ((pair, 2), (many, 1)):
            head(model(input_ids=torch.full((1, length), 9)).last_hidden_state[0, :answers]).sum().backward()
    half = 3 * sum(attention_flop(model.config, length) for length in (pair, many))
    assert planned.flop / 1000 + half == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert planned.trained == sum(one.numel() for one in model.language_model.parameters()) + 500 * TEXT["hidden_size"]


def test_a_reranker_looks_at_a_picture_once_if_there_is_room() -> None:
    mixture = [{"dataset": "d", "task": "t2i", "samples": 1000}]
    kept, seen, half = (
        reranker(mixture=mixture, loss={"batch_size": 10, "visual_tokens_bytes": size})
        for size in (1 << 30, 0, 1000 * 4 * 128)  # of a picture 4 tokens of 128 columns in bfloat16
    )
    assert kept.flop and seen.flop and half.flop
    assert "100% of its pictures" in kept.notes[0] and "50%" in half.notes[0]
    assert not any("visual tokens" in note for note in seen.notes), "nothing is said of 0%"
    drawn = 2 + 4.5  # pictures of a row
    assert (half.flop - kept.flop) / (seen.flop - kept.flop) == pytest.approx(0.5 * drawn / (drawn - 1), rel=0.01)


def test_towers_that_part_are_said() -> None:
    small = {"warmup", "hard_negatives", "finetune"}
    assert not any("will not share" in note for note in shipped("magic_mm_2b")["rerank"].notes)
    apart = shipped("magic_mm_2b", *[f"{name}.lora=null" for name in small])["rerank"]
    assert any("will not share" in note for note in apart.notes)
    assert not any("will not share" in note for note in reranker().notes)


def test_time_is_work_by_speed() -> None:
    recipe = make()
    one, eight = stage(recipe, device="H100"), stage(recipe, devices=8, device="h100")
    assert one.flop and one.hours == pytest.approx(one.flop / (989e12 * 0.084) / 3600)
    assert eight.batch == 80 and one.batch == 10
    assert eight.hours == pytest.approx(one.hours / 8)  # two epochs either way


# ---- Table 9 -------------------------------------------------------------------------------------------------------


def test_the_warm_up_takes_what_table_9_says() -> None:
    ours = shipped("magic_mm_2b")["warmup"]
    assert ours.paper_hours == PAPER_HOURS["2B", 2] == pytest.approx(22.95, abs=0.01)
    assert ours.hours == pytest.approx(ours.paper_hours, rel=0.01)  # by which the utilisation was chosen


def test_the_run_without_compression_is_near_what_table_9_says() -> None:
    options = ("model.visual_token_compression=1", "warmup.loss.batch_size=72", "warmup.loss.chunk_tokens=null")
    vanilla = shipped("magic_mm_2b", *options)["warmup"]
    assert vanilla.batch == 3456
    assert vanilla.paper_hours == pytest.approx(52.73, abs=0.01)
    assert vanilla.hours == pytest.approx(47.0, abs=0.2)  # 11% below
    assert vanilla.memory_gb is not None and vanilla.memory_gb < 80


def test_models_and_stages_that_the_paper_gives_no_time_have_none() -> None:
    assert {one.paper_hours for one in shipped("magic_mm_8b").values()} == {None}
    assert shipped("magic_mm_2b")["finetune"].paper_hours is None


# ---- parameters and memory -----------------------------------------------------------------------------------------


def test_trained_parameters() -> None:
    d, kv, ff = 1536, 256, 8960
    by_hand = 28 * 16 * (2 * (d + d) + 2 * (d + kv) + 3 * (d + ff))  # q and o, k and v, gate, up and down
    assert shipped("magic_mm_2b")["warmup"].trained == by_hand == 18_464_768
    assert shipped("magic_mm_2b")["restore"].trained == pytest.approx(
        2.09e9, rel=0.01
    )  # as the "2B" has, its head included


def saved_bytes(layer: nn.Module, width: int, *more: Any, dtype: torch.dtype) -> float:
    """Bytes that autograd keeps of a layer for each token under bfloat16 autocast."""
    sizes = []
    for tokens in (250, 500):
        weights = {one.untyped_storage().data_ptr() for one in layer.parameters()}
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor, weights: set[int] = weights, kept: dict[int, Tensor] = kept) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        hidden = torch.randn(1, tokens, width, dtype=dtype, requires_grad=True)
        position = [one(hidden, torch.arange(tokens)[None]) for one in more]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one), torch.autocast("cpu", torch.bfloat16):
            layer(hidden, **({"position_embeddings": position[0], "attention_mask": None} if position else {}))
        sizes.append(sum(one.untyped_storage().nbytes() for one in kept.values()))
    return (sizes[1] - sizes[0]) / 250


def planned_bytes(lora: dict[str, Any] | None, task: str = "t2t") -> float:
    """Bytes that the plan adds for each token, or tile, that goes through the model at once."""
    few, many = (
        stage(
            make(
                mixture=[{"dataset": "d", "task": task, "samples": 1000}],
                warmup={"loss": {"batch_size": 500, "chunk_tokens": limit}, "lora": lora},
            )
        )
        for limit in (10_000, 20_000)
    )
    assert few.memory_gb and many.memory_gb
    return (many.memory_gb - few.memory_gb) * 1e9 / 10_000


@pytest.mark.parametrize("lora", [None, {"dropout": 0.0}, {"dropout": 0.05}])
def test_memory_is_what_autograd_keeps(lora: dict[str, Any] | None) -> None:
    config = Qwen2Config(**{**TEXT, "num_hidden_layers": 1}, attn_implementation="sdpa")
    layer: nn.Module = Qwen2DecoderLayer(config, 0).train()
    dtype = torch.float32 if lora is None else torch.bfloat16
    if lora is not None:
        from peft import LoraConfig, inject_adapter_in_model

        layer = layer.to(dtype).requires_grad_(False)
        names = list(LoraRecipe().targets)
        inject_adapter_in_model(LoraConfig(r=4, lora_dropout=lora["dropout"], target_modules=names), layer)
        for name, weight in layer.named_parameters():
            weight.data = weight.data.float() if "lora_" in name else weight.data
    kept = saved_bytes(layer, TEXT["hidden_size"], Qwen2RotaryEmbedding(config), dtype=dtype)
    assert planned_bytes(lora) / TEXT["num_hidden_layers"] == pytest.approx(kept, rel=0.1)


def test_memory_of_the_tower_is_what_autograd_keeps() -> None:
    layer = InternVLVisionLayer(InternVLVisionConfig(**VISION, attention_bias=True, attn_implementation="sdpa")).train()
    kept = saved_bytes(layer, VISION["hidden_size"], dtype=torch.float32)
    tokens = 20 + 4  # of an item: its prompt, and a tile of 64 patches after compression and shuffle
    of_tiles = planned_bytes(None, "i2i") * tokens - planned_bytes(None) * tokens
    assert of_tiles / (65 * VISION["num_hidden_layers"]) == pytest.approx(kept, rel=0.05)


def test_what_does_not_fit_is_told_what_to_do() -> None:
    restore = shipped("magic_mm_8b")["restore"]
    assert restore.memory_gb is not None and restore.memory_gb > 80
    assert "start it with FSDP or DeepSpeed ZeRO-3" in restore.notes[-1]
    assert not any("More than the" in note for one in shipped("magic_mm_2b").values() for note in one.notes)
    small = shipped("magic_mm_2b", devices=1, device="RTX 4090")
    for name in ("restore", "warmup"):
        assert "More than the 24 GB of a device: lower chunk_tokens" in small[name].notes[-1]


# ---- stages --------------------------------------------------------------------------------------------------------


def test_stage_1_counts_packs() -> None:
    restore = shipped("magic_mm_2b")["restore"]
    assert (restore.batch, restore.steps, restore.tokens) == (384, 30_000, 384 * 4096)
    assert restore.visual_tokens is not None and 0 < restore.visual_tokens < restore.tokens


def test_mining_and_judging_look_at_the_tasks_of_their_stage() -> None:
    plans = shipped("magic_mm_2b")
    assert plans["mine"].samples == plans["warmup"].samples == 16_606_300
    assert plans["retrieve"].samples == plans["finetune"].samples == plans["rerank"].samples == 1_548_100
    assert plans["judge"].samples == 20 * (1_548_100 - 8_500)  # HatefulMemes is exempt
    assert plans["judge"].flop == 16e9 * plans["judge"].tokens  # 8 billion parameters


def test_a_judge_of_unknown_size_has_no_time_and_labels_take_none() -> None:
    stages = {
        "retrieve": {"depth": 20, "window": None, "sample": None},
        "finetune": {"optimizer": {"num_epochs": 2, "learning_rate": 1e-3}, "loss": {"num_negatives": 1}},
    }
    judges = {"backend": "transformers", "model": "ours"}, {"backend": "labels"}
    unknown, labels = (
        next(one for one in plan(make(judge=judge, **stages), None, None, "A800") if one.stage == "judge")
        for judge in judges
    )
    assert unknown.hours is None and "'ours' does not tell the size" in unknown.notes[0]
    assert unknown.samples == 20 * 1000
    assert labels.hours == 0


def test_pages_have_more_tiles_and_so_do_pictures_that_the_recipe_says() -> None:
    def visual(*mixture: dict[str, Any]) -> int | None:
        return stage(
            make(mixture=[{"dataset": "d", "task": "t2vd", "samples": 1000, **one} for one in mixture])
        ).visual_tokens

    assert visual({}) == 10 * 5 * 4  # ten pages of four tiles and a thumbnail, four tokens each
    assert visual({"task": "t2i"}) == 10 * 4
    assert visual({"task": "it2t", "max_tiles": 4}) == 10 * 5 * 4
    assert visual({"weight": 1e-9}, {"task": "it2t"}) == 10 * 5 * 4  # pictures of a dataset that has pages


# ---- data that is there --------------------------------------------------------------------------------------------


def on_data(data: Path, recipe: Recipe) -> StagePlan:
    return next(one for one in plan(recipe, data, None, "A800") if one.stage == "warmup")


def test_a_dataset_that_is_there_is_counted(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "emoji", tmp_path / "emoji")
    dataset = RetrievalDataset(tmp_path / "emoji")
    split = dataset.splits[0]
    for folder in ("queries", "pools"):
        (file,) = (tmp_path / "emoji" / folder).glob(f"t2i.{split}.*")
        file.rename(file.with_name(file.name.replace(f".{split}.", ".train.")))
    count = len(RetrievalDataset(tmp_path / "emoji").load("t2i", "train").queries)
    entries: Sequence[dict[str, Any]] = [{"dataset": "emoji", "task": "t2i", "samples": 7}]
    planned = on_data(tmp_path, make(mixture=entries))
    assert planned.samples == count != 7
    assert planned.visual_tokens == 10 * 4
    lang = {"lang": "en"}
    fewer = on_data(tmp_path, make(mixture=[{**entries[0], "where": lang}]))
    assert fewer.samples is not None and 0 < fewer.samples <= count
    # what is not there counts as the recipe says
    more = on_data(tmp_path, make(mixture=[*entries, {"dataset": "else", "task": "t2t", "samples": 5}]))
    assert more.samples == count + 5


def test_conversations_that_are_there_are_counted(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "<image>" + 33 * "a"}, {"role": "assistant", "content": 40 * "b"}]}
    (tmp_path / "c.jsonl").write_text(3 * (json.dumps(row | {"images": ["a.png"]}) + "\n"))
    restore = {"optimizer": {"num_steps": 10, "learning_rate": 1e-3}, "data": [{"file": "c.jsonl"}]}
    recipe = make(restore=restore | {"loss": {"max_tokens": 100, "max_tiles": 1}})
    planned = next(one for one in plan(recipe, tmp_path, None, "A800") if one.stage == "restore")
    assert planned.samples == 3
    assert planned.visual_tokens == round(100 * 4 / (4 + 80 / 4))
    (tmp_path / "c.jsonl").write_text("{}\n")
    with pytest.raises(DatasetError, match=r"c\.jsonl, line 1, is no conversation"):
        plan(recipe, tmp_path, None, "A800")


def test_what_cannot_be_planned_is_said() -> None:
    with pytest.raises(RecipeError, match=r"d/t2t cannot be planned without its data.*`samples`.*: give --data"):
        stage(make(mixture=[{"dataset": "d", "task": "t2t"}]))
    with pytest.raises(RecipeError, match=r"no device 'H1000'.*Did you mean 'H100'"):
        stage(make(), device="H1000")
    with pytest.raises(RecipeError, match="at least 1 device, got 0"):
        stage(make(), devices=0)


@pytest.mark.parametrize(
    ("checkpoint", "changes", "message"),
    [
        (None, {"vision_token_merging": 0.9}, "no such model.*vision_token_merging=0.9 is too much for a tower of 4"),
        ("OpenGVLab/InternVL3-2B-hf", {"vision_token_merging": 0.99}, "too much for a tower of 24 layers"),
        ("Qwen/Qwen2-VL-2B-Instruct", {"vision_token_merging": 0.5}, "vision_token_merging is for InternVL"),
        ("Qwen/Qwen2-VL-2B-Instruct", {"visual_token_compression": 4}, r"must be one of \(1, 2\), got 4"),
        (None, {"max_pixels": 10_000}, "model.max_pixels has no effect on a model of the type 'internvl_vtc'"),
    ],
)
def test_a_model_that_cannot_be_is_said(checkpoint: str | None, changes: dict[str, Any], message: str) -> None:
    made = {"checkpoint": checkpoint} if checkpoint else {"vision": VISION, "text": TEXT, "vocab_size": 500}
    with pytest.raises(RecipeError, match=message):
        stage(make(model=made | changes))


def test_pixels_of_a_stage_are_for_models_that_heed_them() -> None:
    warmup = {"loss": {"batch_size": 10, "max_pixels": 50_176}}
    with pytest.raises(RecipeError, match=r"warmup\.loss\.max_pixels has no effect on a model"):
        stage(make(warmup=warmup))
    assert stage(make(warmup=warmup, model={"checkpoint": "Qwen/Qwen2-VL-2B-Instruct"})).steps == 200


def test_devices_are_found_by_any_spelling() -> None:
    assert find_device("rtx 4090") is DEVICES["RTX4090"]
    assert DEVICES["A800"].tflops == 312 and DEVICES["A800"].memory_gb == 80
