"""Stage 1, restoration: the whole model learns to continue conversations about compressed pictures.

Legend of shapes: B packs, L tokens of the longest, N labelled tokens of all of them, D columns, T tiles, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from quarterlight.data.conversations import IMAGE, Conversation, Conversations
from quarterlight.data.packing import PackedSampler, Sample, cut, pack_all
from quarterlight.errors import ImageError, RecipeError, check_least, check_share
from quarterlight.images import describe, image_size
from quarterlight.models.backbones import backbone_of
from quarterlight.models.inputs import PlainText, frame_ids
from quarterlight.models.pooling import visual_tokens
from quarterlight.models.positions import Positions
from quarterlight.models.processor import VTCImageProcessor, VTCProcessor
from quarterlight.models.settings import MAX_PIXELS
from quarterlight.models.tiles import Grid
from quarterlight.records import ImageSource, Item
from quarterlight.training.batches import Batches, BatchTrainer
from quarterlight.training.collate import Pictures
from quarterlight.training.distributed import rank, world_size
from quarterlight.training.optimizer import OptimizerRecipe, recompute_activations
from quarterlight.training.writer import Writer

_GROUNDING = ("<ref>", "</ref>", "<box>", "</box>")  # InternVL's marks of phrases and boxes
_SLICE = 1024  # labelled tokens whose scores of the whole vocabulary exist at once: 0.6 GB in float32 at 151,674 words


@dataclass(frozen=True, kw_only=True)
class RestoreRecipe:
    """What stage 1 does beyond its optimiser."""

    max_tokens: int = 4096
    """tokens of a pack, those of pictures included; longer conversations are cut after an answer or left out"""
    packs_per_device: int = 1
    """packs of a batch on each device"""
    max_tiles: int = 4
    """the most tiles of a picture; a thumbnail is added to more than one (paper: 4)"""
    max_pixels: int | None = None
    """for Qwen-VL: the most pixels of a picture, for each of its max_tiles; without it, as an embedder made of the same
    checkpoint has them (``model.max_pixels``, or 300 visual tokens)"""
    eval_every: int = 1000
    """steps between measurements of the loss on held-out conversations; 0 for none"""
    eval_conversations: int = 500
    """held-out conversations of a source that are measured"""
    max_unreadable: float = 0.01
    """share of unreadable pictures above which training stops"""

    def __post_init__(self) -> None:
        check_least(self, max_tokens=1, packs_per_device=1, max_tiles=1, max_pixels=1, eval_conversations=1)
        check_least(self, eval_every=0)
        check_share(self, "max_unreadable")


class ConversationTokenizer:
    """Conversations in ChatML, as InternVL3 reads them; what people wrote holds no special tokens but those of boxes.

        <|im_start|>user
        <img><IMG_CONTEXT>...</img>     (or as another backbone writes pictures)
        What is this?<|im_end|>
        <|im_start|>assistant
        a red apple<|im_end|>

    Labelled are the tokens of the assistant's words and the end of its turns.
    """

    def __init__(self, processor: VTCProcessor, max_tiles: int, max_pixels: int | None = None) -> None:
        self.processor = processor
        self.max_tiles = max_tiles
        self.max_pixels = max_pixels or MAX_PIXELS
        self._plain = PlainText(processor.tokenizer, heeded=_GROUNDING)
        self._frame = lru_cache(maxsize=16)(self._encode)

    def __call__(self, conversation: Conversation) -> Sample:
        """The conversation as tokens; of its pictures only the headers are read."""
        processor = self.processor
        tiles = tuple(self._count(source) for source in conversation.images)
        counts = iter(tiles)
        ids: list[int] = []
        labelled: list[bool] = []
        ends: list[int] = []

        def add(more: Sequence[int], label: bool = False) -> None:
            ids.extend(more)
            labelled.extend([label] * len(more))

        pieces = [
            message.content.strip().split(IMAGE) if message.role == "user" else [message.content.strip()]
            for message in conversation.messages
        ]
        encoded = iter(self._plain([piece for parts in pieces for piece in parts]))
        for number, (message, parts) in enumerate(zip(conversation.messages, pieces, strict=True)):
            add(self._frame("\n" * (number > 0) + f"<|im_start|>{message.role}\n"))
            for place in range(len(parts)):
                if place:
                    add([processor.start_image_token_id])
                    add([processor.image_token_id] * processor.num_visual_tokens(next(counts)))
                    add([processor.end_image_token_id])
                    ends.append(len(ids))
                add(next(encoded), message.role == "assistant")
            add(self._frame("<|im_end|>"), message.role == "assistant")
        return Sample(
            id=conversation.id,
            ids=np.array(ids, np.int32),
            labelled=np.array(labelled),
            images=conversation.images,
            tiles=tiles,
            image_ends=tuple(ends),
        )

    def _encode(self, text: str) -> tuple[int, ...]:
        return frame_ids(self.processor.tokenizer, text)

    def _count(self, source: ImageSource) -> Grid:
        """How a picture is cut; into one tile if it cannot be read, which whoever decodes it will find out."""
        cutter: VTCImageProcessor = self.processor.image_processor
        if cutter.most_tiles(self.max_tiles, self.max_pixels) == 1:
            return cutter.blank().grid
        try:
            width, height = image_size(source)
            return cutter.grid_of(width, height, self.max_tiles, self.max_pixels)
        except (ImageError, ValueError):
            return cutter.blank().grid


class PackCollator:
    """Packs to the tensors that :func:`next_token_loss` reads; pictures are decoded here.

    A picture that cannot be read becomes white tiles, and what is said of it loses its labels.
    """

    def __init__(self, processor: VTCProcessor, recipe: RestoreRecipe, positions: Positions = Positions.MROPE) -> None:
        self.processor = processor
        self.positions = positions
        self.slices = math.ceil(recipe.packs_per_device * recipe.max_tokens / _SLICE)
        max_pixels = recipe.max_pixels or MAX_PIXELS
        self.pictures = Pictures(processor.image_processor, max_tiles=recipe.max_tiles, max_pixels=max_pixels)

    def __call__(self, packs: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        """One row a pack.

        input_ids, position_ids: int64 [B, L]; positions start again with each sample, and with the padding.  Where they
            have three axes they are [4, B, L], places in the row first, from which transformers tells samples apart.
        places: int64 [N], where in the flattened [B, L] a labelled token is the next.  labels: int64 [N], that token.
        pixel_values: what the tower reads, if there are pictures; grids: int64 [P, 2], where they are pairs.
        slices: into how many parts the labels are cut.
        ids: of the samples.  unreadable: why pictures cannot be read.  num_pictures: of the samples.
        """
        length = max(1, *(sum(map(len, pack)) for pack in packs))
        input_ids = np.full((len(packs), length), self.processor.tokenizer.pad_token_id, np.int64)
        position_ids = np.zeros_like(input_ids)
        labelled = np.zeros(input_ids.shape, np.bool_)
        tiles: list[np.ndarray[Any, Any]] = []
        axes = torch.zeros(self.processor.num_axes, *input_ids.shape, dtype=torch.int64)
        unreadable: list[str] = []
        for row, pack in enumerate(packs):
            start = 0
            for sample in pack:
                stop = start + len(sample)
                input_ids[row, start:stop] = sample.ids
                position_ids[row, start:stop] = np.arange(len(sample))
                labelled[row, start:stop] = sample.labelled
                if len(axes) > 1:
                    axes[:, row, start:stop] = self.processor.positions(
                        sample.ids.tolist(), sample.tiles, self.positions
                    )
                if sample.images:
                    one, reasons = self._tiles(sample)
                    tiles.append(one)
                    unreadable += reasons
                    labelled[row, start:stop] &= not reasons
                start = stop
            position_ids[row, start:] = np.arange(length - start)
        # a sample begins with the frame of its first turn, so that a labelled token always has one before it
        places = np.flatnonzero(labelled)
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.from_numpy(position_ids),
            "places": torch.from_numpy(places - 1),
            "labels": torch.from_numpy(input_ids.reshape(-1)[places]),
            "slices": self.slices,
            "ids": [sample.id for pack in packs for sample in pack],
            "unreadable": unreadable,
            "num_pictures": sum(len(sample.images) for pack in packs for sample in pack),
        }
        if self.processor.num_axes > 1:
            batch["position_ids"] = torch.cat([batch["position_ids"][None], axes])
            if tiles:
                batch["grids"] = torch.tensor([grid for pack in packs for sample in pack for grid in sample.tiles])
        if tiles:
            batch["pixel_values"] = self.processor.image_processor.normalize_tiles(
                torch.from_numpy(np.concatenate(tiles))
            )
        return batch

    def _tiles(self, sample: Sample) -> tuple[np.ndarray[Any, Any], list[str]]:
        """uint8 ``[T, H, W, 3]`` of a sample's pictures, and why some cannot be read; all are white then."""
        item = Item(image=sample.images)
        tiles_THW3, (counts,) = self.pictures.tiles([item])
        reasons = self.pictures.whys(item)
        if not reasons and tuple(counts) == sample.tiles:
            return tiles_THW3, []
        blank = np.concatenate([self.processor.image_processor.blank(grid).pixels for grid in sample.tiles])
        return blank, reasons or [f"{describe(sample.images[0])} has changed since its header was read."]


def next_token_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of the labelled tokens, in nats, summed over all of them (paper, eq. 4); scalar, float32.

    batch: what :class:`PackCollator` makes, on the model's device.  Divide by ``len(batch["labels"])`` for the mean.

    Samples of a pack do not see one another: with restarting positions and no mask, transformers makes attention
    block-diagonal.  Hidden states are picked where a token is labelled before they meet the language head, and go
    through it in slices that the backward pass works out again: ``[L, V]`` never exists.  Without pictures, a blank
    tile goes through the tower and counts nothing, since sharded weights are gathered by all processes or by none.
    """
    input_ids = batch["input_ids"]
    embeds_BLD = model.get_input_embeddings()(input_ids)
    backbone = backbone_of(model.config)
    more: dict[str, Any] = {}
    tokens = visual_tokens(model.model, batch)
    if tokens is None:
        embeds_BLD = embeds_BLD + backbone.blank(model).to(embeds_BLD.dtype)
    else:
        embeds_BLD, more = backbone.place(model.model, input_ids, embeds_BLD, tokens)
    hidden_BLD = model.model.language_model(
        inputs_embeds=embeds_BLD, position_ids=batch["position_ids"], use_cache=False, **more
    ).last_hidden_state
    hidden_ND = hidden_BLD.flatten(0, 1)[batch["places"]]
    # as many slices whatever the number of labels, so that all processes call the head equally often
    slices = zip(hidden_ND.tensor_split(batch["slices"]), batch["labels"].tensor_split(batch["slices"]), strict=True)
    losses = [checkpoint(_slice_loss, model.lm_head, *one, use_reentrant=False) for one in slices]
    return torch.stack(losses).sum()


def _slice_loss(head: nn.Module, hidden_ND: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden_ND).float(), labels_N, reduction="sum")


class _Writer(Writer):
    """The model as ``Trainer`` sees it."""

    accepts_loss_kwargs = True  # has Trainer count the labels of all batches of a step, on all processes

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        return next_token_loss(self.model, batch)


class RestoreTrainer(BatchTrainer):
    """``Trainer`` with the next-token loss, and the same on held-out conversations as its evaluation."""

    def __init__(
        self,
        *,
        batches: Batches,
        recipe: RestoreRecipe,
        collate: PackCollator,
        held_out: Mapping[str, list[list[Sample]]],
        **more: Any,
    ) -> None:
        super().__init__(batches=batches, eval_dataset=list(held_out), max_unreadable=recipe.max_unreadable, **more)
        self.recipe = recipe
        self.collate = collate
        self.held_out = held_out

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a batch over the labels of its whole step: all packs, on all processes.

        Raises RecipeError on a loss that is not finite, DatasetError when too many pictures cannot be read.
        """
        self._begin(inputs, ["ids"])
        loss = model(inputs)
        self._check(loss, self.state.global_step)
        # processes average their gradients, where a sum is wanted
        return loss * world_size() / max(1, int(num_items_in_batch))

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss of a labelled token, in nats: over each source's held-out conversations, and over all of them."""
        started = time.monotonic()
        totals = {label: self._total(packs) for label, packs in self.held_out.items()}
        metrics = {f"eval_loss_{label.replace('/', '_')}": loss / count for label, (loss, count) in totals.items()}
        loss, count = (sum(one) for one in zip(*totals.values(), strict=True))
        metrics["eval_loss"] = loss / count
        return self._validated(metrics, started)

    @torch.no_grad()
    def _total(self, packs: list[list[Sample]]) -> tuple[float, int]:
        """Sum and number over the packs; each process takes its share, and an empty pack where that falls short."""
        model = self.model_wrapped.eval()
        batch, processes = self.recipe.packs_per_device, world_size()
        total = torch.zeros(2, dtype=torch.float64)
        for start in range(
            rank() * batch, math.ceil(len(packs) / batch / processes) * batch * processes, batch * processes
        ):
            inputs = self.collate(packs[start : start + batch] or [[]])
            total[0] += float(model(self._prepare_inputs(inputs)))
            total[1] += len(inputs["labels"])
        total = self.accelerator.reduce(total.to(self.args.device), "sum")
        model.train()
        return float(total[0]), max(1, int(total[1]))


def hold_out(
    sources: Sequence[Conversations], tokenize: ConversationTokenizer, recipe: RestoreRecipe
) -> dict[str, list[list[Sample]]]:
    """Packs of ``recipe.eval_conversations`` of each source, spread over all of it, by the source's label."""
    held_out = {}
    for source in sources:
        places = np.linspace(0, len(source) - 1, min(recipe.eval_conversations, len(source))).astype(int)
        samples = (cut(tokenize(source[int(place)]), recipe.max_tokens) for place in places)
        held_out[source.label] = pack_all([sample for sample in samples if sample is not None], recipe.max_tokens)
    return held_out


def train_restore(
    model: Any,
    processor: VTCProcessor,
    *,
    sources: Sequence[Conversations],
    validation: Sequence[Conversations],
    recipe: RestoreRecipe,
    optimizer: OptimizerRecipe,
    folder: Path,
    seed: int,
    weights: Sequence[float] | None = None,
    positions: Positions = Positions.MROPE,
) -> RestoreTrainer:
    """Trains all weights of ``model`` in place on packed conversations, and returns its trainer.

    weights: share of the conversations of each source, relative to the others; ``None`` gives each conversation the
        same chance.
    positions: for Qwen-VL, where visual tokens stand.
    Under a launcher of several processes they train together.  Where the weights are sharded, the first process's model
    has them whole in the end.  Resumes from ``folder`` if a run was stopped there.
    """
    text_config: Any = model.config.text_config
    flash = "flash" in str(text_config._attn_implementation)
    if flash and recipe.packs_per_device > 1:  # which tells packed samples apart in batches of one row only
        raise RecipeError("With flash attention packs_per_device must be 1: accumulate gradients, or take sdpa.")
    tokenize = ConversationTokenizer(processor, recipe.max_tiles, recipe.max_pixels)
    sampler = PackedSampler(sources, tokenize=tokenize, max_tokens=recipe.max_tokens, weights=weights, seed=seed)
    collate = PackCollator(processor, recipe, positions)
    packs, accumulated = recipe.packs_per_device * world_size(), optimizer.gradient_accumulation_steps
    num_packs = math.ceil(sum(map(len, sources)) / sampler.conversations_per_pack)
    num_steps = optimizer.steps(num_packs, packs * accumulated)

    def make(number: int) -> dict[str, Any]:
        first = number * packs + rank() * recipe.packs_per_device
        return collate([sampler.pack(first + one) for one in range(recipe.packs_per_device)])

    if optimizer.gradient_checkpointing:
        recompute_activations(model)
    writer = _Writer(model)
    trainer = RestoreTrainer(
        model=writer,
        args=optimizer.threaded(
            folder, seed=seed, num_steps=num_steps, eval_every=recipe.eval_every if validation else 0
        ),
        batches=Batches(make, num_steps * accumulated, num_threads=optimizer.num_workers),
        recipe=recipe,
        collate=collate,
        held_out=hold_out(validation, tokenize, recipe) if recipe.eval_every else {},
    )
    trainer.run(writer)
    return trainer
