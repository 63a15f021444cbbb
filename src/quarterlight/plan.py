"""What a recipe will cost: steps, tokens, memory and hours of every stage, counted before anything runs.

Work of one stage = sum over its samples of

    tiles x tower x (1 + again) + language model x (1 + backward + checkpointing + again)

Each term is a forward pass (:mod:`quarterlight.models.flops`).  ``backward`` is 2 where weights are trained (gradients
of weights and of inputs, arXiv:2001.08361, section 2.1); under LoRA it is 1 for matrix products, whose weights get no
gradient, and 2 for attention, and the tower, before which nothing is trained, has none.  ``checkpointing`` is 1 if
layers are computed again for the backward pass; ``again`` is 1 if a batch is cut into chunks, whose embeddings are
computed twice (GradCache, arXiv:2101.06983).  Time = work / (devices x peak of a device x utilisation).

The tower of ``rerank`` is frozen and looks at each picture once, as long as there is room for what it sees.

What is not known before the data is there is assumed, and :data:`ASSUMPTIONS` says how.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoModel, AutoModelForImageTextToText, InternVLVisionConfig, Qwen2Config
from transformers.initialization import no_init_weights

from quarterlight.data.registry import find
from quarterlight.data.retrieval import PAGE_MAX_TILES, PAGE_TASK, PICTURE_MAX_TILES, RetrievalDataset
from quarterlight.errors import DatasetError, RecipeError, did_you_mean
from quarterlight.models.backbones import backbone_of
from quarterlight.models.checkpoint import load_config, load_settings, resolve_checkpoint
from quarterlight.models.flops import attention_flop, key_value_columns, text_flop, vision_flop
from quarterlight.models.internvl_vtc.configuration import InternVLVTCConfig
from quarterlight.models.merging import MERGING
from quarterlight.models.presets import Preset, preset_of
from quarterlight.models.settings import MAX_PIXELS, TEXT_MAX_TOKENS
from quarterlight.models.shapes import QWEN_SHAPES, SHAPES, shape_config
from quarterlight.recipe import (
    ContrastStage,
    EmbedStage,
    MixtureStage,
    Recipe,
    RerankStage,
    SourceRecipe,
    TaskRecipe,
    check_heeded,
)
from quarterlight.records import Item
from quarterlight.training.lora import LoraRecipe, add_lora

UTILISATION = 0.084
"""Share of a device's peak that contrastive training, and embedding, reach by the count above.

Calibrated: it gives the warm-up of ``recipes/magic_mm_2b.yaml`` the 22h57m06s that Table 9 of the paper has for 48
A800.  So it holds what the count leaves out: padding, loading of pictures, waiting, the paper's software.
It gives the same run without compression, 72 queries on a device, 47 hours, where Table 9 has 52h43m35s.
"""

DENSE_UTILISATION = 0.3
"""The same for packs of full length, and for servers that batch prompts. Assumed: the paper gives no time for these."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A kind of device."""

    tflops: float
    """peak of dense bfloat16 matrix products that add up in float32, in TFLOP/s, as its maker states it"""
    memory_gb: float
    """memory, in GB as its maker counts them"""
    utilisation: float | None = None
    """share of the peak that is reached by whatever stage, where it has been measured"""


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "A800": Device(tflops=312, memory_gb=80),
        "A100": Device(tflops=312, memory_gb=80),
        "A100-40GB": Device(tflops=312, memory_gb=40),
        "H100": Device(tflops=989, memory_gb=80),
        "H800": Device(tflops=989, memory_gb=80),
        "H200": Device(tflops=989, memory_gb=141),
        "H20": Device(tflops=148, memory_gb=96),
        "B200": Device(tflops=2250, memory_gb=180),
        "L20": Device(tflops=119.5, memory_gb=48),
        "L40S": Device(tflops=362, memory_gb=48),
        "A10": Device(tflops=125, memory_gb=24),
        "RTX3090": Device(tflops=71, memory_gb=24),
        "RTX4090": Device(tflops=165.2, memory_gb=24),
        "RTX5090": Device(tflops=209.5, memory_gb=32),
        # two cores with AMX: what a 4096^3 product reached (benchmarks/results/vtc-2b.json), and the share of the peak
        # that ten training steps at nano's shape reached on a busy core
        "CPU": Device(tflops=2.35, memory_gb=24, utilisation=0.2),
    }
)
"""Name -> its SXM variant if it has several. Utilisation is calibrated on the A800 and assumed for the others."""

PAPER_HOURS = MappingProxyType({("2B", 2): 22 + 57 / 60 + 6 / 3600, ("2B", 1): 52 + 43 / 60 + 35 / 3600})
"""(InternVL3, s) -> hours of the warm-up on 48 A800 (Table 9)."""

PAPER_SAMPLES = MappingProxyType(
    {
        "restore": 32_000_000,
        "warmup": 16_000_000,
        "hard_negatives": 16_000_000,
        "finetune": 1_500_000,
        "rerank": 1_500_000,
    }
)
"""Stage -> how much data the paper has for it (section 4, Table 14)."""

PROMPT_TOKENS = 20
"""Of the template and a usual instruction, around text and pictures."""

TEXT_TOKENS = 30
"""Of a query's or a candidate's text, where the data is not there to be asked."""

CONVERSATION_TOKENS = 250
"""Of the words of a conversation, likewise."""

JUDGE_PROMPT_TOKENS = 60
"""Of a judge's template and instruction, or of the frame of a conversation made of a retrieval row."""

RERANK_TOKENS = 70
"""Of a reranker's template and a usual instruction, around query and candidates."""

NUMBER_TOKENS = 4
"""Of the number of a candidate in a list, in brackets."""

LABEL_SHARE = 0.5
"""Of the words of a conversation that the assistant speaks, likewise."""

JUDGE_TILE_TOKENS = 196
"""Of a picture of 448 pixels in a judge that makes one token of 32 x 32 pixels, as Qwen3-VL does."""

ASSUMPTIONS = (
    f"a text has {TEXT_TOKENS} tokens, or a quarter of its characters where the data is there; with its prompt, "
    f"{PROMPT_TOKENS} more",
    "a page has as many tiles as it may have, and a thumbnail",
    "a query has one target of its own, so candidates are as many as queries, where the data is not there",
    "a query has hard negatives enough for a list of any length; the template of a reranker is counted for each prompt",
    "padding is not counted; mining is counted as if it were exact",
)
"""Said under the table."""

_FULL_BYTES = 18  # float32 weights, gradients, two moments of AdamW, and the bfloat16 copies that autocast keeps
_LORA_BYTES = 16  # the same without the copies, for adapters only; frozen weights are bfloat16
_SAMPLED = 1000  # lines of a file of conversations that are looked at for their mean length
_CHARACTERS = 4  # of a token


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage will do. ``None`` is what does not apply, or cannot be told beforehand."""

    stage: str
    samples: int | None = None
    """queries, conversations or pairs that it has, each counted once"""
    paper_samples: int | None = None
    """the same as the paper reports it"""
    batch: int | None = None
    """queries or packs of one optimiser step, over all devices"""
    steps: int | None = None
    """optimiser steps"""
    tokens: int | None = None
    """of one optimiser step over all devices, visual ones included; of the whole stage if it has no steps"""
    visual_tokens: int | None = None
    """the visual ones among them"""
    trained: int | None = None
    """parameters that are trained"""
    flop: float | None = None
    """operations of the whole stage"""
    memory_gb: float | None = None
    """of one device at the most: weights, gradients, optimiser and activations, in 10^9 bytes"""
    hours: float | None = None
    paper_hours: float | None = None
    """of the same stage on 48 A800, as the paper reports it"""
    notes: Sequence[str] = ()
    """sentences on what is peculiar"""


def plan(recipe: Recipe, data: Path | None, devices: int | None, device: str) -> list[StagePlan]:
    """The stages of a recipe, in order.

    data: the directory of the datasets; without it, or for a dataset that is not in it, the recipe's ``samples`` count.
    devices: how many, in place of the recipe's.  device: a name of :data:`DEVICES`, in any case.
    Raises RecipeError for an unknown device, a model whose sizes are not known without its files, or a dataset that is
    neither there nor has ``samples``.
    """
    planner = _Planner(recipe, data, recipe.devices if devices is None else devices, find_device(device))
    stages = [planner.stage(name) for name in recipe.stages]
    shape = _shape(recipe.model.checkpoint)
    if shape not in ("2B", "8B") or recipe.model.vision_token_merging:  # the paper merges nothing in the tower
        return stages
    hours = PAPER_HOURS.get((shape, recipe.model.visual_token_compression))
    return [
        replace(
            one,
            paper_samples=PAPER_SAMPLES.get(one.stage),
            paper_hours=hours if one.stage == "warmup" else None,
        )
        for one in stages
    ]


def find_device(name: str) -> Device:
    """A device by its name. Raises RecipeError for an unknown one."""
    for known, device in DEVICES.items():
        if known.lower() == name.lower().replace(" ", ""):
            return device
    raise RecipeError(f"There is no device {name!r} to plan for. {did_you_mean(name, DEVICES)}")


class _Planner:
    """The stages of one recipe; what they share is counted once."""

    def __init__(self, recipe: Recipe, data: Path | None, devices: int, device: Device) -> None:
        if devices < 1:
            raise RecipeError(f"A plan needs at least 1 device, got {devices}.")
        self.recipe = recipe
        self.devices = devices
        self.device = device
        self.config: Any = _config(recipe)  # transformers does not tell the types of its parts
        check_heeded(recipe, self.config)
        self.backbone = backbone_of(self.config)
        self.tile_tokens = self.backbone.tokens_per_tile(self.config)
        self._max_pixels = _max_pixels(recipe)
        self.sizes = _Sizes(recipe, data, self._most_tiles)
        self._adapters: dict[LoraRecipe, int] = {}

    def _most_tiles(self, tiles: int, max_pixels: int | None = None) -> int:
        """The most tiles, as the backbone cuts pictures, of one that may have so many tiles of so many pixels each."""
        return self.backbone.most_tiles(self.config, tiles, max_pixels or self._max_pixels)

    def stage(self, name: str) -> StagePlan:
        """The plan of one stage."""
        if name in self.recipe.contrast:
            return self._contrast(name, self.recipe.contrast[name])
        if name == "distill":
            assert self.recipe.distill is not None
            return self._contrast(name, self.recipe.distill)
        if name in ("mine", "retrieve"):
            return self._retrieve(name)
        stages = {
            "teacher": self._teacher,
            "tower": self._tower,
            "restore": self._restore,
            "judge": self._judge,
            "teach": self._teach,
            "rerank": self._rerank,
        }
        if name in stages:
            return stages[name]()
        return StagePlan(stage=name, notes=("Seconds: random weights, and a tokenizer from the texts.",))

    def _tower_flop(self, tiles: float) -> float:
        """Operations of vision tower and connector for so many tiles, in pictures as large as natural ones may be."""
        return vision_flop(self.config, tiles, self.sizes.most(PICTURE_MAX_TILES))

    def _teacher(self) -> StagePlan:
        stage = self.recipe.teacher
        assert stage is not None
        samples = sum(task.num_queries for task in self.sizes.tasks("teacher"))
        batch = stage.loss.batch_size * self.devices
        return StagePlan(
            stage="teacher",
            samples=samples,
            batch=batch,
            steps=stage.optimizer.steps(samples, batch),
            notes=("A small convolutional network, whose time is not estimated.",),
        )

    def _tower(self) -> StagePlan:
        stage = self.recipe.tower
        assert stage is not None
        return StagePlan(
            stage="tower",
            batch=stage.imitation.batch_size,
            steps=stage.optimizer.num_steps,
            trained=_numel(self.backbone.parts(self._embedder)[0]),
            notes=("Pictures alone; its time is not estimated.",),
        )

    def _restore(self) -> StagePlan:
        stage = self.recipe.restore
        assert stage is not None
        sources, optimizer, length = self.sizes.sources(), stage.optimizer, stage.loss.max_tokens
        weight = sum(source.weight for source in sources)
        text = sum(source.weight * source.text for source in sources) / weight
        visual = sum(source.weight * source.tiles for source in sources) / weight * self.tile_tokens
        samples = sum(source.num_samples for source in sources)
        batch = stage.loss.packs_per_device * self.devices * optimizer.gradient_accumulation_steps
        steps = optimizer.steps(round(samples * (text + visual) / length), batch)

        share = visual / (text + visual)
        tiles = length * share / self.tile_tokens
        model = self._model(language_head=True)
        trained = _numel(model)
        layers = self._tower_flop(tiles) + text_flop(self.config, length)
        head = 2 * _numel(model.lm_head) * length * (1 - share) * LABEL_SHARE
        # the head goes slice by slice, and every slice is computed again in the backward pass
        pack = (3 + optimizer.gradient_checkpointing) * layers + 4 * head
        packs = stage.loss.packs_per_device
        activations = self._saved_bytes(packs * length, packs * tiles, optimizer.gradient_checkpointing, None)
        seen = steps * batch * length / (samples * (text + visual))
        return self._with_hours(
            StagePlan(
                stage="restore",
                samples=samples,
                batch=batch,
                steps=steps,
                tokens=batch * length,
                visual_tokens=round(batch * length * share),
                trained=trained,
                flop=steps * batch * pack,
                memory_gb=(_FULL_BYTES * trained + activations) / 1e9,
                notes=(
                    f"Packs of {length:,} tokens, which hold all conversations {seen:.1f} times.",
                    *self._space(_FULL_BYTES * trained, activations),
                ),
            ),
            DENSE_UTILISATION,
        )

    def _contrast(self, name: str, stage: EmbedStage) -> StagePlan:
        tasks, loss, optimizer = self.sizes.tasks(name), stage.loss, stage.optimizer
        if loss.max_pixels is not None:
            tasks = [task.shrunk(self._most_tiles(1, loss.max_pixels) / self._most_tiles(1)) for task in tasks]
        samples = sum(task.num_queries for task in tasks)
        taught = self.recipe.teach if name in ("distill", "continue_hard") else None
        if taught is not None:
            samples = round(taught.share * samples)
        # candidates of a query: the target and its negatives, or the list of a teacher
        listed = 1 + stage.num_negatives if isinstance(stage, ContrastStage) else self._depth
        batch = loss.batch_size * self.devices * optimizer.gradient_accumulation_steps
        steps = optimizer.steps(samples, batch)
        tokens = visual = flop = held_tokens = held_tiles = 0.0
        chunked = []
        for task in tasks:
            share = task.weight / sum(one.weight for one in tasks)
            row = [task.query, *[task.candidate] * listed]
            row_tokens = sum(side.tokens(self.tile_tokens) for side in row)
            row_tiles = sum(side.tiles for side in row)
            local = loss.batch_size * row_tokens
            again = loss.chunk_tokens is not None and local > loss.chunk_tokens
            if again:
                chunked.append(task.label)
            tokens += share * row_tokens
            visual += share * row_tiles * self.tile_tokens
            flop += share * sum(self._train_flop(side, stage, again) for side in row)
            held = min(local, loss.chunk_tokens or local)
            held_tokens, held_tiles = max(held_tokens, held), max(held_tiles, held / row_tokens * row_tiles)
        trained = self._trained(stage.lora)
        activations = self._saved_bytes(held_tokens, held_tiles, optimizer.gradient_checkpointing, stage.lora)
        divisible = (_FULL_BYTES if stage.lora is None else _LORA_BYTES) * trained
        frozen = 0 if stage.lora is None else (2 if optimizer.bf16 else 4) * _numel(self._embedder)
        twice = f"More than chunk_tokens, and so computed twice: {', '.join(chunked)}."
        return self._with_hours(
            StagePlan(
                stage=name,
                samples=samples,
                batch=batch,
                steps=steps,
                tokens=round(batch * tokens),
                visual_tokens=round(batch * visual),
                trained=trained,
                flop=steps * batch * flop,
                memory_gb=(frozen + divisible + activations) / 1e9,
                notes=(*[twice] * bool(chunked), *self._space(divisible, frozen + activations)),
            )
        )

    def _rerank(self) -> StagePlan:
        stage = self.recipe.rerank
        assert stage is not None
        tasks, loss, optimizer = self.sizes.tasks("rerank"), stage.loss, stage.optimizer
        samples = sum(task.num_queries for task in tasks)
        batch = loss.batch_size * self.devices * optimizer.gradient_accumulation_steps
        steps = optimizer.steps(samples, batch)
        listed = 1 + (loss.min_negatives + loss.max_negatives) / 2
        tokens = visual = flop = longest = 0.0
        for task in tasks:
            share = task.weight / sum(one.weight for one in tasks)
            query, candidate = (side.text + side.tiles * self.tile_tokens for side in (task.query, task.candidate))
            # both pairs are one sequence
            pair = RERANK_TOKENS + query + 2 * candidate if loss.pointwise_weight else 0.0
            many = RERANK_TOKENS + query + listed * (candidate + NUMBER_TOKENS) if loss.listwise_weight else 0.0
            tiles = bool(pair) * (task.query.tiles + 2 * task.candidate.tiles)
            tiles += bool(many) * (task.query.tiles + listed * task.candidate.tiles)
            tokens += share * (pair + many)
            visual += share * tiles * self.tile_tokens
            flop += share * sum(self._language_flop(one, stage) for one in (pair, many))
            longest = max(longest, loss.batch_size * (pair + many))
        answers = 2 * bool(loss.pointwise_weight) + bool(loss.listwise_weight)
        model = self._model(language_head=True)
        flop += 3 * answers * 2 * _numel(model.lm_head)
        pictures, kept = self._pictures_of(stage)
        drawn = steps * batch * visual / self.tile_tokens
        flop_in_all = steps * batch * flop + self._tower_flop(min(drawn, pictures + (1 - kept) * drawn))
        frozen = sum(_numel(part) for part in self.backbone.parts(model))
        trained = _numel(model) - frozen if stage.lora is None else self._trained(stage.lora)
        rest = (_numel(model) - (0 if stage.lora else trained)) * (2 if stage.lora and optimizer.bf16 else 4)
        activations = rest + self._saved_bytes(longest, 0, optimizer.gradient_checkpointing, stage.lora)
        divisible = (_FULL_BYTES if stage.lora is None else _LORA_BYTES) * trained
        notes = []
        if kept >= 0.005:  # else it would be told of 0%
            part = f"{kept:.0%}"
            notes.append(f"Keeps the visual tokens of {part} of its pictures in memory: these are looked at once.")
        if stage.initial == "restore" and any(one.lora is None for one in self.recipe.contrast.values()):
            notes.append(
                "The embedder trains its vision tower after restore: the two will not share one, and images are looked "
                "at twice in a search. Say initial: finetune, or give the contrastive stages lora."
            )
        if divisible + activations > self.device.memory_gb * 1e9:
            notes.append(
                f"More than the {self.device.memory_gb:g} GB of a device, and this stage divides no weights: lower the "
                "batch, turn on gradient_checkpointing, or train with lora."
            )
        return self._with_hours(
            StagePlan(
                stage="rerank",
                samples=samples,
                batch=batch,
                steps=steps,
                tokens=round(batch * tokens),
                visual_tokens=round(batch * visual),
                trained=trained,
                flop=flop_in_all,
                memory_gb=(divisible + activations) / 1e9,
                notes=notes,
            )
        )

    def _pictures_of(self, stage: RerankStage) -> tuple[float, float]:
        """Tiles of all pictures of the stage, and the share of them whose visual tokens fit into a device's memory."""
        tiles = sum(
            task.num_queries * task.query.tiles + task.num_candidates * task.candidate.tiles
            for task in self.sizes.distinct("rerank")
        )
        size = tiles * self.tile_tokens * self.backbone.width(self.config) * (2 if stage.optimizer.bf16 else 4)
        return tiles, min(1.0, stage.loss.visual_tokens_bytes / size) if size else 1.0

    @property
    def _depth(self) -> int:
        """Candidates of a list of the teacher."""
        assert self.recipe.teach is not None
        return self.recipe.teach.depth

    def _teach(self) -> StagePlan:
        recipe = self.recipe.teach
        assert recipe is not None
        found = self._retrieve("teach")
        assert found.flop is not None and found.tokens is not None and found.visual_tokens is not None
        pairs, tokens, visual, flop = 0.0, 0.0, 0.0, 0.0
        for task in self.sizes.distinct("teach"):
            count = recipe.share * task.num_queries * recipe.depth
            pictures = (task.query.tiles + task.candidate.tiles) * self.tile_tokens
            length = RERANK_TOKENS + task.query.text + task.candidate.text + pictures
            pairs, tokens, visual = pairs + count, tokens + count * length, visual + count * pictures
            flop += count * (text_flop(self.config, length) + vision_flop(self.config, task.candidate.tiles))
        return self._with_hours(
            replace(
                found,
                samples=round(pairs),
                tokens=found.tokens + round(tokens),
                visual_tokens=found.visual_tokens + round(visual),
                flop=found.flop + flop,
                notes=(
                    f"Pairs: {recipe.depth} candidates for each of {recipe.share:.0%} of the queries.",
                    *found.notes,
                ),
            )
        )

    def _train_flop(self, side: _Side, stage: EmbedStage, again: bool) -> float:
        """Operations of forward and backward for one query or candidate: the sum at the top of this file."""
        tower = self._tower_flop(side.tiles)
        looked = 1 + again if stage.lora or stage.freeze_eyes else 3 + stage.optimizer.gradient_checkpointing + again
        return looked * tower + self._language_flop(side.tokens(self.tile_tokens), stage, again)

    def _language_flop(self, tokens: float, stage: MixtureStage, again: bool = False) -> float:
        """The part of the language model in that sum, for a sequence of so many tokens."""
        text = text_flop(self.config, tokens)
        forward = 1 + stage.optimizer.gradient_checkpointing + again
        if stage.lora is None:
            return (forward + 2) * text
        adapters = 2 * self._trained(stage.lora) * tokens
        return forward * (text + adapters) + text + attention_flop(self.config, tokens) + 2 * adapters

    def _retrieve(self, name: str) -> StagePlan:
        tasks = self.sizes.distinct(name)
        columns = self.config.text_config.hidden_size
        tokens = visual = flop = 0.0
        for task in tasks:
            for side, count in ((task.query, task.num_queries), (task.candidate, task.num_candidates)):
                tokens += count * side.tokens(self.tile_tokens)
                visual += count * side.tiles * self.tile_tokens
                flop += count * self._tower_flop(side.tiles)
                flop += count * text_flop(self.config, side.tokens(self.tile_tokens))
            flop += 2.0 * columns * task.num_queries * task.num_candidates
        stored = 4 * columns * sum(task.num_queries + task.num_candidates for task in tasks)
        return self._with_hours(
            StagePlan(
                stage=name,
                samples=sum(task.num_queries for task in tasks),
                tokens=round(tokens),
                visual_tokens=round(visual),
                flop=flop,
                notes=(f"Keeps {_gigabytes(stored)} of embeddings, if in float32, on disk while it runs.",),
            )
        )

    def _judge(self) -> StagePlan:
        recipe, retrieve = self.recipe.judge, self.recipe.retrieve
        assert recipe is not None and retrieve is not None
        first, last = retrieve.window or (1, retrieve.depth)
        kept = retrieve.sample or last - first + 1
        pairs, tokens, visual = 0, 0.0, 0.0
        for task in self.sizes.distinct("judge"):
            if task.label not in recipe.exempt:
                count = task.num_queries * min(kept, task.num_candidates)
                pictures = (
                    (task.query.tiles + task.candidate.tiles) / self.sizes.most(PICTURE_MAX_TILES) * JUDGE_TILE_TOKENS
                )
                pairs += count
                visual += count * pictures
                tokens += count * (JUDGE_PROMPT_TOKENS + task.query.text + task.candidate.text + pictures)
        if recipe.backend == "labels":
            return StagePlan(
                stage="judge", samples=pairs, hours=0.0, notes=("Pairs, judged by the labels of the data.",)
            )
        size = re.search(r"(\d+(?:\.\d+)?)B\b", recipe.model or "")
        asked = StagePlan(stage="judge", samples=pairs, tokens=round(tokens), visual_tokens=round(visual))
        if size is None:
            note = f"Pairs. No time is estimated, since the name {recipe.model!r} does not tell the size of the model."
            return replace(asked, notes=(note,))
        note = f"Pairs, judged by {recipe.model} on as many devices."
        return self._with_hours(replace(asked, flop=2e9 * float(size[1]) * tokens, notes=(note,)), DENSE_UTILISATION)

    def _with_hours(self, stage: StagePlan, utilisation: float = UTILISATION) -> StagePlan:
        assert stage.flop is not None
        rate = self.devices * self.device.tflops * 1e12 * (self.device.utilisation or utilisation)
        return replace(stage, hours=stage.flop / rate / 3600)

    def _space(self, divisible: float, rest: float) -> list[str]:
        """What to do when so many bytes do not fit into a device, of which FSDP and ZeRO-3 divide the first."""
        limit = self.device.memory_gb * 1e9
        if divisible + rest <= limit:
            return []
        parts = divisible / self.devices + rest
        over = f"More than the {self.device.memory_gb:g} GB of a device:"
        if parts <= limit:
            return [
                f"{over} start it with FSDP or DeepSpeed ZeRO-3, which divide weights and optimiser and come to "
                f"{_gigabytes(parts)} a device."
            ]
        return [f"{over} lower chunk_tokens or the batch, or turn on gradient_checkpointing."]

    def _saved_bytes(self, tokens: float, tiles: float, checkpointing: bool, lora: LoraRecipe | None) -> float:
        """Bytes that activations take when so many tokens and tiles go through the model at once.

        The coefficients are what autograd keeps of a layer under bfloat16 autocast (tests/test_plan.py counts it on
        single layers).  With checkpointing, every layer keeps its input, and one at a time the rest.
        """
        text, vision = self.config.text_config, self.backbone.tower(self.config)
        d = text.hidden_size
        other = 8 * text.intermediate_size + 4 * key_value_columns(self.config)
        if lora is None:
            layer, entry = 31 * d + other, 4 * d
        elif lora.dropout:  # keeps what it has dropped, for each of the seven products
            layer, entry = 49 * d + other + 4 * text.intermediate_size, 2 * d
        else:
            layer, entry = 25 * d + other, 2 * d
        saved = tokens * _kept(text.num_hidden_layers, layer, entry, checkpointing)
        d, patches = vision.width, tiles * vision.sequence
        if lora is not None:  # nothing is kept of a frozen tower but what the layer at work has in hand
            return saved + patches * (6 * d + 4 * vision.mlp)
        layer = 28 * d + 4 * vision.mlp
        return saved + patches * _kept(vision.num_layers, layer, 4 * d, checkpointing)

    @cached_property
    def _embedder(self) -> Any:
        return self._model()

    def _model(self, *, language_head: bool = False) -> Any:
        """The model on the meta device: its parameters have shapes and nothing else."""
        auto = AutoModelForImageTextToText if language_head else AutoModel
        with no_init_weights(), torch.device("meta"):
            return auto.from_config(self.config)

    def _trained(self, lora: LoraRecipe | None) -> int:
        """How many parameters a contrastive stage trains."""
        if lora is None:
            return _numel(self._embedder)
        if lora not in self._adapters:
            model = self._model()
            with no_init_weights(), torch.device("meta"):  # gigabytes of adapters otherwise
                add_lora(model, lora, seed=0)
            self._adapters[lora] = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        return self._adapters[lora]


def _kept(layers: int, layer: float, entry: float, checkpointing: bool) -> float:
    return layers * entry + layer if checkpointing else layers * layer


def _numel(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters())


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _shape(checkpoint: str | None) -> str | None:
    """``2B`` of OpenGVLab/InternVL3-2B-hf, ``Qwen2-VL-2B`` of Qwen/Qwen2-VL-2B-Instruct; ``None`` for another model."""
    found = re.fullmatch(r"(?:OpenGVLab/InternVL3-|Qwen/)([\w.-]+)-(?:hf|Instruct)", checkpoint or "")
    return found[1] if found and found[1] in {**SHAPES, **QWEN_SHAPES} else None


def _config(recipe: Recipe) -> Any:
    """The sizes of the recipe's model, without reading or fetching its weights.

    Raises RecipeError, or CheckpointError, for sizes that go together in no model.
    """
    model = recipe.model
    shape = _shape(model.checkpoint)
    if model.checkpoint is not None and shape is None:
        released = _released(recipe)
        tower = released.tower if released else None
        return load_config(
            resolve_checkpoint(model.checkpoint), model.visual_token_compression, tower, model.vision_token_merging
        )
    try:
        if shape is None:
            assert model.vocab_size is not None
            return InternVLVTCConfig(
                vision_config=InternVLVisionConfig(**model.vision),
                text_config=Qwen2Config(**model.text, vocab_size=model.vocab_size),
                visual_token_compression=model.visual_token_compression,
                vision_token_merging=model.vision_token_merging or 0.0,
            )
        config = shape_config(shape, visual_token_compression=model.visual_token_compression)
        if model.vision_token_merging is None:
            return config
        return type(config).from_dict(config.to_dict() | {MERGING: model.vision_token_merging})
    except ValueError as error:
        raise RecipeError(f"There is no such model as the recipe's: {error}") from error


def _released(recipe: Recipe) -> Preset | None:
    """What the folder of the recipe's checkpoint leaves out, where others released it."""
    model = recipe.model
    if model.checkpoint is None or _shape(model.checkpoint) is not None:
        return None
    return preset_of(model.checkpoint, resolve_checkpoint(model.checkpoint), model.preset)


def _max_pixels(recipe: Recipe) -> int:
    """The most pixels of a picture, for each of its tiles: as the recipe says, or the checkpoint."""
    model = recipe.model
    if model.max_pixels is not None:
        return model.max_pixels
    if (released := _released(recipe)) is not None:
        return released.settings.max_pixels
    if model.checkpoint is None or _shape(model.checkpoint) is not None:
        return MAX_PIXELS
    return load_settings(resolve_checkpoint(model.checkpoint)).max_pixels


@dataclass(frozen=True, kw_only=True)
class _Side:
    """A query or a candidate, on average."""

    text: float
    """tokens of its text"""
    tiles: float

    def tokens(self, tile_tokens: float) -> float:
        """All tokens, those of its prompt included."""
        return PROMPT_TOKENS + self.text + self.tiles * tile_tokens


@dataclass(frozen=True, kw_only=True)
class _Task:
    """An entry of a mixture."""

    label: str
    weight: float
    num_queries: int
    num_candidates: int
    query: _Side
    candidate: _Side

    def shrunk(self, share: float) -> _Task:
        """With so large a share of the tiles."""
        query, candidate = (replace(side, tiles=share * side.tiles) for side in (self.query, self.candidate))
        return replace(self, query=query, candidate=candidate)


@dataclass(frozen=True, kw_only=True)
class _Source:
    """An entry of the data of ``restore``; text and tiles are means of its conversations."""

    weight: float
    num_samples: int
    text: float
    tiles: float


class _Sizes:
    """How much data a recipe has, and of what size: as it lies there, or as the recipe says."""

    def __init__(self, recipe: Recipe, data: Path | None, most: Callable[..., int]) -> None:
        """most: the most tiles of a picture that may have so many, as the backbone cuts pictures; a second argument are
        the pixels of a tile, where a stage has its own."""
        self.recipe = recipe
        self.data = data
        self.most = most
        self._measured: dict[str, _Task] = {}

    def tasks(self, stage: str) -> list[_Task]:
        """The entries of a stage's mixture."""
        trained = self.recipe.trained.get(stage)
        weights = trained.weights if trained else {}
        return [replace(self._task(one), weight=weights.get(one.label, one.weight)) for one in self.recipe.tasks(stage)]

    def distinct(self, stage: str) -> list[_Task]:
        """The tasks of a stage, each once and whole."""
        return list({one.label: self._task(replace(one, where={})) for one in self.recipe.tasks(stage)}.values())

    def sources(self) -> list[_Source]:
        """The entries of the data of ``restore``."""
        stage = self.recipe.restore
        assert stage is not None
        most = self.most(stage.loss.max_tiles, stage.loss.max_pixels)
        return [self._source(one, most) for one in stage.data]

    def _task(self, one: TaskRecipe) -> _Task:
        if self._is_there(one.dataset):
            return self._measure(one)
        if one.samples is None:
            raise self._missing(one.label)
        tiles = one.max_tiles or (PAGE_MAX_TILES if one.dataset in self._pages else PICTURE_MAX_TILES)
        query, candidate = (
            _Side(text=TEXT_TOKENS * ("t" in side), tiles=self.most(tiles) * (side != "t"))
            for side in one.task.split("2")
        )
        return _Task(
            label=one.label,
            weight=one.weight,
            num_queries=one.samples,
            num_candidates=one.samples,
            query=query,
            candidate=candidate,
        )

    def _measure(self, one: TaskRecipe) -> _Task:
        """A task that is there."""
        assert self.data is not None
        key = json.dumps([one.label, dict(one.where), one.max_tiles], sort_keys=True)
        if key not in self._measured:
            task = RetrievalDataset(self.data / one.dataset).load(one.task, "train")
            queries = [q for q in task.queries if all(q.fields.get(name) == value for name, value in one.where.items())]
            self._measured[key] = _Task(
                label=one.label,
                weight=one.weight,
                num_queries=len(queries),
                num_candidates=len(task.candidates),
                query=self._mean([query.item for query in queries], one.max_tiles),
                candidate=self._mean([candidate.item for candidate in task.candidates], one.max_tiles),
            )
        return self._measured[key]

    def _mean(self, items: Sequence[Item], max_tiles: int | None) -> _Side:
        if not items:
            return _Side(text=0, tiles=0)
        longest = self.recipe.model.text_max_tokens or TEXT_MAX_TOKENS
        return _Side(
            text=statistics.fmean(min(longest, len(item.text or "") / _CHARACTERS) for item in items),
            tiles=statistics.fmean(len(one.images) * self.most(max_tiles or one.max_tiles or 1) for one in items),
        )

    def _source(self, one: SourceRecipe, most: int) -> _Source:
        if one.dataset is not None and one.task is not None and self._is_there(one.dataset):
            task = self._measure(TaskRecipe(dataset=one.dataset, task=one.task, where=one.where))
            text = JUDGE_PROMPT_TOKENS + task.query.text + task.candidate.text
            return _Source(weight=one.weight, num_samples=task.num_queries, text=text, tiles=task.query.tiles)
        if one.file is not None and self.data is not None and (self.data / one.file).is_file():
            return _conversations(self.data / one.file, one.weight, most)
        if one.samples is None:
            raise self._missing(one.label)
        wordy = one.registry is not None and find(one.registry)[0].meta_task.startswith("Pure Text")
        return _Source(weight=one.weight, num_samples=one.samples, text=CONVERSATION_TOKENS, tiles=0 if wordy else most)

    @cached_property
    def _pages(self) -> set[str]:
        """The datasets that have a task of pages, which makes pages of all of their pictures."""
        mixtures = [self.recipe.mixture, *(self.recipe.tasks(stage) for stage in self.recipe.trained)]
        return {one.dataset for mixture in mixtures for one in mixture if one.task == PAGE_TASK}

    def _is_there(self, dataset: str) -> bool:
        return self.data is not None and (self.data / dataset).is_dir()

    def _missing(self, label: str) -> RecipeError:
        lacking = "and the recipe does not say how many `samples` it has"
        if self.data is None:
            return RecipeError(f"{label} cannot be planned without its data, {lacking}: give --data, where it lies.")
        return RecipeError(f"{label} cannot be planned: it is not in {self.data}, {lacking}.")


def _conversations(path: Path, weight: float, most: int) -> _Source:
    """A file of conversations: lines are counted, the first of them are looked at. Raises DatasetError."""
    texts, pictures = [], []
    with path.open(encoding="utf-8") as file:
        try:
            for line in islice(file, _SAMPLED):
                row = json.loads(line)
                texts.append(sum(len(message["content"]) for message in row["messages"]) / _CHARACTERS)
                pictures.append(len(row.get("images", ())))
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{path}, line {len(texts) + 1}, is no conversation: run `quarterlight data check`."
            ) from error
        count = len(texts) + sum(1 for _ in file)
    if not texts:
        raise DatasetError(f"{path} has no conversations.")
    return _Source(
        weight=weight, num_samples=count, text=statistics.fmean(texts), tiles=statistics.fmean(pictures) * most
    )
