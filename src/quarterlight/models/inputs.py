"""Items to tensors, the same way for training and for use.

B rows, L tokens, T tiles, H and W pixels.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quarterlight.errors import CheckpointError, InputError
from quarterlight.models.pictures import Pictures
from quarterlight.models.processor import VTCProcessor
from quarterlight.models.settings import EmbedderSettings
from quarterlight.models.tiles import Grid, Tiles
from quarterlight.prompts import MARKERS, Prompt, Role, Segment
from quarterlight.records import ImageSource, Item, ItemLike

_tokenizing = threading.Lock()
"""Held while a tokenizer works: it is told how to treat special tokens in one call and does so in the next, whichever
thread makes that."""


def frame_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of words of our own, in which special tokens mean what they say."""
    with _tokenizing:
        return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])


def check_markers(tokenizer: Any, settings: EmbedderSettings) -> None:
    """Raises CheckpointError when the prompts need markers of instructions that the tokenizer does not have."""
    if not settings.marked:
        return
    known = tokenizer.get_added_vocab()
    if missing := [one for one in MARKERS if one not in known]:
        raise CheckpointError(
            f"The model in {tokenizer.name_or_path or 'memory'} has prompts of the style {settings.prompt_style} and "
            f"{settings.pooling} pooling, for which its tokenizer needs {', '.join(MARKERS)}; it lacks "
            f"{', '.join(missing)}. They are added once, before training, with "
            "quarterlight.models.tokenizer.with_markers, and saved with the model."
        )


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt whose pictures are still single slots, because their tiles have not been counted.

    runs: (kind of segment, token ids) in order; the ids of a picture are empty.
    num_cut: texts that lost their ends.
    """

    runs: tuple[tuple[str, tuple[int, ...]], ...]
    num_cut: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens besides those of pictures."""
        return sum(len(ids) for _, ids in self.runs)

    @property
    def opening(self) -> tuple[int, ...]:
        """Tokens before the first text or picture: what prompts of one task have in common."""
        ours = takewhile(lambda run: run[0] not in ("text", "image"), self.runs)
        return tuple(chain.from_iterable(ids for _, ids in ours))


class PlainText:
    """Token ids of words that others wrote, in which the spelling of a special token is only a spelling.

    Texts are cut around such spellings, as ``apply_chat_template(sanitize_control_tokens=True)`` does.
    heeded: special tokens that keep their meaning, where the tokenizer has them.
    """

    def __init__(self, tokenizer: Any, heeded: Sequence[str] = ()) -> None:
        special = {token.content: (i,) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._tokenizer = tokenizer
        self._special = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
        self._heeded = {name: special[name] for name in heeded if name in special}

    def __call__(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The ids of each text."""
        pieces = [[piece for piece in self._special.split(text) if piece] for text in texts]
        words = [piece for piece in chain.from_iterable(pieces) if piece not in self._heeded]
        encoded: Iterator[Sequence[int]] = iter(())
        if words:
            with _tokenizing:
                encoded = iter(self._tokenizer(words, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        return [tuple(chain.from_iterable(self._heeded.get(one) or next(encoded) for one in parts)) for parts in pieces]


class SegmentTokenizer:
    """Token ids of prompts, segment by segment; texts and instructions are plain text whatever they contain.

    text_max_tokens: tokens above which the end of a text is cut off.
    pool_frame: ``False`` counts the frame among what a mean leaves out.
    """

    def __init__(self, processor: VTCProcessor, text_max_tokens: int, *, pool_frame: bool = True) -> None:
        self.processor = processor
        self.text_max_tokens = text_max_tokens
        self._unpooled = ("instruction", "marker") if pool_frame else ("instruction", "marker", "frame")
        self._plain = PlainText(processor.tokenizer)
        self._ids = lru_cache(maxsize=1024)(self._encode)

    def __call__(self, prompts: Sequence[Sequence[Segment]]) -> list[TokenizedPrompt]:
        """The tokens of each prompt."""
        texts = dict.fromkeys(one.text for one in chain.from_iterable(prompts) if one.kind == "text")
        limit = self.text_max_tokens
        text_ids = dict(zip(texts, self._plain(list(texts)), strict=True))
        return [
            TokenizedPrompt(
                tuple(
                    (kind, text_ids[text][:limit] if kind == "text" else self._ids(kind, text)) for kind, text in prompt
                ),
                sum(kind == "text" and len(text_ids[text]) > limit for kind, text in prompt),
            )
            for prompt in prompts
        ]

    def num_image_tokens(self, grid: Grid) -> int:
        """Tokens of a picture that was cut so, its two brackets included."""
        return 2 + self.processor.num_visual_tokens(grid)

    def expand(self, prompt: TokenizedPrompt, grids: Sequence[Grid]) -> tuple[list[int], list[int]]:
        """All token ids, and 1 for each that a mean leaves out: those of the instruction, its markers included.

        grids: of each picture.
        A row of nothing else keeps the frame that it should leave out: there is no mean of no tokens.
        """
        processor, counts = self.processor, iter(grids)
        all_ids: list[int] = []
        instruction: list[int] = []
        for kind, ids in prompt.runs:
            if kind == "image":
                context = [processor.image_token_id] * processor.num_visual_tokens(next(counts))
                ids = (processor.start_image_token_id, *context, processor.end_image_token_id)
            all_ids += ids
            instruction += [int(kind in self._unpooled)] * len(ids)
        if all(instruction):
            spared = ((int(kind != "frame"), len(ids)) for kind, ids in prompt.runs)
            instruction = [one for one, count in spared for _ in range(count)]
        return all_ids, instruction

    def _encode(self, kind: str, text: str) -> tuple[int, ...]:
        """Ids of a frame or an instruction, of which there are few."""
        if kind == "instruction":
            return self._plain([text])[0]
        return frame_ids(self.processor.tokenizer, text)


class InputFormatter:
    """Writes items as the model was taught to read them.

    Words that others wrote (texts and instructions) are plain text whatever they contain: ``<|im_end|>`` in a document
    is spelt out, never the token that ends a turn.
    """

    def __init__(
        self, processor: VTCProcessor, settings: EmbedderSettings, *, decode_margin: int | None = None
    ) -> None:
        """
        decode_margin: as of :class:`quarterlight.models.embedder.Embedder`.
        """
        self.processor = processor
        self.settings = settings
        self.pictures = Pictures(
            image_processor=processor.image_processor,
            max_tiles=settings.max_tiles,
            max_pixels=settings.max_pixels,
            decode_margin=decode_margin,
        )
        check_markers(processor.tokenizer, settings)
        self._tokenize = SegmentTokenizer(processor, settings.text_max_tokens, pool_frame=settings.pool_frame)

    def __call__(self, items: Sequence[ItemLike], role: Role, instruction: str | None = None) -> dict[str, Tensor]:
        """Tensors on the CPU for :func:`quarterlight.models.pooling.embed`; pictures are decoded here.

        instruction: of items without one of their own; ``None`` takes the checkpoint's default for their modality.
        Raises InputError naming the position of an item that cannot be used.
        """
        parsed = [Item.parse(item) for item in items]
        prompts = [self.prompt(item, role, instruction, position) for position, item in enumerate(parsed)]
        tiles = [self.tiles(item) for item in parsed]
        batch = self.collate(self.tokenize(prompts), [[picture.grid for picture in pictures] for pictures in tiles])
        if pictures := [picture.pixels for picture in chain.from_iterable(tiles)]:
            batch["pixel_values"] = self.processor.image_processor.normalize_tiles(
                torch.from_numpy(np.concatenate(pictures))
            )
        return batch

    def prompt(self, item: Item, role: Role, instruction: str | None = None, position: int = 0) -> Prompt:
        """The prompt of an item; a picture that may have more tiles than one is a page.

        Raises InputError, naming the position, for an item without text and image.
        """
        text, modality = (item.text or "").strip(), item.modality
        if not text and not item.images:
            raise InputError(f"Item {position} has neither text nor image: give at least one.")
        if item.instruction is not None:
            instruction = item.instruction
        check_instruction(instruction)
        if instruction is None:
            defaults = self.settings.instructions[role]
            page = modality == "image" and self.max_tiles(item) > 1
            instruction = defaults.get("page", defaults[modality]) if page else defaults[modality]
        return Prompt(
            role=role,
            instruction=instruction,
            num_images=len(item.images),
            text=text,
            system=self.settings.system_prompt,
            style=self.settings.prompt_style,
            marked=self.settings.marked,
        )

    def max_tiles(self, item: Item) -> int:
        """The most tiles of each of an item's pictures."""
        return item.max_tiles or self.settings.max_tiles

    def tiles(self, item: Item) -> list[Tiles]:
        """Each of an item's pictures, cut up. Raises ImageError."""
        return [self.cut(one, self.max_tiles(item)) for one in item.images]

    def cut(self, source: ImageSource, max_tiles: int) -> Tiles:
        """A picture in so many tiles at most, cut up. Raises ImageError."""
        return self.pictures.cut(source, max_tiles)

    def most_tiles(self, max_tiles: int) -> int:
        """Tiles that :meth:`cut` makes, at most."""
        return int(self.processor.image_processor.most_tiles(max_tiles, self.settings.max_pixels))

    def most_image_tokens(self, max_tiles: int) -> int:
        """Tokens of a picture in so many tiles at most, its two brackets included."""
        return 2 + self.processor.most_visual_tokens(max_tiles, self.settings.max_pixels)

    def tokenize(self, prompts: Iterable[Prompt]) -> list[TokenizedPrompt]:
        """Token ids of prompts, segment by segment, texts cut to ``text_max_tokens``."""
        return self._tokenize([prompt.segments() for prompt in prompts])

    def num_image_tokens(self, grid: Grid) -> int:
        """Tokens of a picture that was cut so, its two brackets included."""
        return self._tokenize.num_image_tokens(grid)

    def collate(self, prompts: Sequence[TokenizedPrompt], grids: Sequence[Sequence[Grid]]) -> dict[str, Tensor]:
        """int64 ``[B, L]`` tensors, padded on the right: ``input_ids``, ``attention_mask``, ``instruction_mask``.

        Where positions have several axes also ``position_ids``, int64 ``[axes, B, L]``, and ``grids``, int64 ``[P, 2]``
        of all pictures in order, if there are any.
        grids: for each prompt, how each of its pictures was cut.
        """
        rows = [self._tokenize.expand(prompt, counts) for prompt, counts in zip(prompts, grids, strict=True)]
        length = max(len(ids) for ids, _ in rows)
        batch = torch.zeros(3, len(rows), length, dtype=torch.int64)
        batch[0] = self.processor.tokenizer.pad_token_id
        for index, (ids, instruction) in enumerate(rows):
            batch[0, index, : len(ids)] = torch.tensor(ids)
            batch[1, index, : len(ids)] = 1
            batch[2, index, : len(ids)] = torch.tensor(instruction)
        inputs = dict(zip(("input_ids", "attention_mask", "instruction_mask"), batch, strict=True))
        if self.processor.num_axes > 1:
            positions = torch.zeros(self.processor.num_axes, len(rows), length, dtype=torch.int64)
            for index, ((ids, _), own) in enumerate(zip(rows, grids, strict=True)):
                positions[:, index, : len(ids)] = self.processor.positions(ids, own, self.settings.positions)
            inputs["position_ids"] = positions
            if pairs := list(chain.from_iterable(grids)):
                inputs["grids"] = torch.tensor(pairs)
        return inputs


def check_instruction(instruction: str | None) -> None:
    """Raises InputError for an instruction that is no text."""
    if instruction is not None and not isinstance(instruction, str):
        raise InputError(f"An instruction is a string, or None for the default one; got {type(instruction).__name__}.")
