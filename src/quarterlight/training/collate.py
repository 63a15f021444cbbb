"""Batches of items to tensors for training, chunk by chunk, in threads that work ahead of the model.

B rows, L tokens, T tiles, H and W pixels, D columns of an embedding; Q queries and C candidates of a batch, U of them
distinct.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from quarterlight.data.contrastive import Batch
from quarterlight.errors import ImageError
from quarterlight.images import load_image
from quarterlight.models.inputs import InputFormatter, TokenizedPrompt
from quarterlight.models.processor import VTCImageProcessor
from quarterlight.models.tiles import Grid, Tiles, num_tiles
from quarterlight.prompts import Role
from quarterlight.records import ImageSource, Item
from quarterlight.training.augment import AugmentRecipe, augment, draw
from quarterlight.training.distributed import share
from quarterlight.training.eyes import PictureKey, VisualTokens, show
from quarterlight.training.threads import InputThreads

_PROMPTS_KEPT = 1 << 17
_BYTES_KEPT = 1 << 30


class Pictures:
    """The tiles of pictures, kept as bytes in memory after their first use (12 KiB for a tile of 64 pixels).

    max_tiles: the most tiles of a picture whose item does not say.
    max_pixels: as in an embedder's settings; ``None`` takes the checkpoint's limit.
    max_bytes: of tiles that are kept; what comes later is decoded whenever it is used.
    A picture that cannot be read is one white tile, and :attr:`unreadable` says why.  Threads may share one object.
    """

    def __init__(
        self,
        image_processor: VTCImageProcessor,
        recipe: AugmentRecipe | None = None,
        *,
        max_tiles: int = 1,
        max_pixels: int | None = None,
        max_bytes: int = _BYTES_KEPT,
    ) -> None:
        self.image_processor = image_processor
        self.recipe = recipe
        self.max_tiles = max_tiles
        self.max_pixels = max_pixels
        self.unreadable: dict[ImageSource, str] = {}
        self._room = max_bytes
        self._tiles: dict[Hashable, Tiles] = {}

    def tiles(self, items: Sequence[Item]) -> tuple[np.ndarray, list[list[Grid]]]:
        """uint8 ``[T, H, W, 3]`` of all the items' pictures, and for each item how each of its pictures was cut."""
        tiles = [[self._one(source, item.max_tiles or self.max_tiles) for source in item.images] for item in items]
        flat = [one.pixels for pictures in tiles for one in pictures]
        stacked = np.concatenate(flat) if flat else np.empty((0, *self.image_processor.tile_pixels, 3), np.uint8)
        return stacked, [[one.grid for one in pictures] for pictures in tiles]

    def whys(self, item: Item) -> list[str]:
        """Why pictures of an item that has been used could not be read; empty if all could."""
        if not self.unreadable:
            return []
        return [
            self.unreadable[one]
            for one in item.images
            if not isinstance(one, Image.Image) and one in self.unreadable  # an opened picture has no hash
        ]

    def pixel_values(
        self, tiles_THW3: np.ndarray, counts: Sequence[Sequence[Grid]], chance_P9: Tensor | None = None
    ) -> Tensor:
        """float32, as the vision tower reads it (``[T, 3, H, W]`` of an InternVL); augmented when there is a recipe and
        chance.

        counts: how each item's pictures were cut.  Of those that are tiles beside each other, one of several stays as
            it is, or its tiles would not fit together.
        chance_P9: of :func:`quarterlight.training.augment.draw`, a row for each picture.
        """
        pixels = torch.from_numpy(tiles_THW3)
        grids = [grid for pictures in counts for grid in pictures]
        if self.recipe is not None and chance_P9 is not None and grids:
            pixels = self._augmented(pixels, grids, self.recipe, chance_P9)
        return self.image_processor.normalize_tiles(pixels)

    @staticmethod
    def _augmented(pixels: Tensor, grids: Sequence[Grid], recipe: AugmentRecipe, chance_P9: Tensor) -> Tensor:
        count_P = torch.tensor([num_tiles(grid) for grid in grids], dtype=torch.int64)
        alone_P = torch.tensor([grid == 1 for grid in grids])
        if alone_P.any():
            alone_T = alone_P.repeat_interleave(count_P)
            pixels = pixels.float()
            pixels[alone_T] = augment(pixels[alone_T], recipe, chance_P9[alone_P])
        if all(isinstance(grid, int) for grid in grids):
            return pixels
        changed = []
        for number, (grid, tiles_THW3) in enumerate(zip(grids, pixels.split(count_P.tolist()), strict=True)):
            assert not isinstance(grid, int)  # one picture, which is put together and cut up again
            (rows, columns), (_, height, width, _) = grid, tiles_THW3.shape
            whole = tiles_THW3.unflatten(0, grid).swapaxes(1, 2).reshape(1, rows * height, columns * width, 3)
            whole = augment(whole, recipe, chance_P9[number : number + 1])
            blocks = whole.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
            changed.append(blocks.reshape(-1, height, width, 3))
        return torch.cat(changed)

    def _cut(self, picture: Image.Image, max_tiles: int) -> Tiles:
        return self.image_processor.cut(picture, max_tiles, self.max_pixels)

    def _one(self, source: ImageSource, max_tiles: int) -> Tiles:
        if isinstance(source, Image.Image):  # mutable and without a name: nothing to remember it by
            return self._cut(source, max_tiles)
        key = (source, max_tiles)
        if (kept := self._tiles.get(key)) is not None:
            return kept
        if source in self.unreadable:
            return self.image_processor.blank()
        try:
            tiles = self._cut(load_image(source), max_tiles)
        except ImageError as error:
            self.unreadable[source] = str(error)
            return self.image_processor.blank()
        if tiles.pixels.nbytes <= self._room:
            self._room -= tiles.pixels.nbytes
            self._tiles[key] = tiles
        return tiles


class ItemEncoder(Protocol):
    """Turns the items of one side of a batch into the inputs of a model."""

    pictures: Pictures

    def __call__(self, items: Sequence[Item], role: Role, chance_P9: Tensor | None = None) -> dict[str, Any]:
        """Tensors on the CPU.  chance_P9: for augmentation, a row for each picture; ``None`` outside of training."""

    def num_tokens(self, items: Sequence[Item], role: Role) -> list[int]:
        """The most tokens that each item can have, known before its pictures are decoded."""


class SecondEncoder(Protocol):
    """Makes the inputs of a teacher that embeds the same items."""

    def beside(self, inputs: Mapping[str, Any], items: Sequence[Item]) -> dict[str, Any]: ...


class PromptEncoder:
    """Inputs of a multimodal language model: prompts and tiles; those of a teacher beside them, if there is one.

    known: visual tokens of a tower that is frozen: pictures are then given by name, with tiles where they are unknown.
        Pictures are not augmented, and there is no teacher.
    """

    def __init__(
        self,
        formatter: InputFormatter,
        pictures: Pictures,
        teacher: SecondEncoder | None = None,
        known: VisualTokens | None = None,
    ) -> None:
        self.formatter = formatter
        self.pictures = pictures
        self.teacher = teacher
        self.known = known
        self._prompts: dict[Hashable, TokenizedPrompt] = {}

    def __call__(self, items: Sequence[Item], role: Role, chance_P9: Tensor | None = None) -> dict[str, Any]:
        if self.known is not None:
            return self._by_name(items, role, self.known)
        tiles_THW3, counts = self.pictures.tiles(items)
        inputs: dict[str, Any] = self.formatter.collate(self._tokenized(items, role), counts)
        if len(tiles_THW3):
            inputs["pixel_values"] = self.pictures.pixel_values(tiles_THW3, counts, chance_P9)
        if self.teacher is not None and chance_P9 is not None:
            inputs["teacher"] = self.teacher.beside(inputs, items)
        return inputs

    def _by_name(self, items: Sequence[Item], role: Role, known: VisualTokens) -> dict[str, Any]:
        """Inputs with ``picture_keys``, ``fresh`` tiles, uint8 ``[T, H, W, 3]``, of the pictures not known, and how
        these were ``cut``."""
        fresh: dict[PictureKey, Tensor] = {}
        cut: dict[PictureKey, Grid] = {}
        shown = [
            list(show(one, one.max_tiles or self.pictures.max_tiles, self.pictures, known, fresh, cut)) for one in items
        ]
        grids = [[grid for _, grid in one] for one in shown]
        inputs: dict[str, Any] = self.formatter.collate(self._tokenized(items, role), grids)
        if keys := [key for one in shown for key, _ in one]:
            inputs |= {"picture_keys": keys, "fresh": fresh, "cut": cut}
        return inputs

    def num_tokens(self, items: Sequence[Item], role: Role) -> list[int]:
        return [
            prompt.num_tokens
            + len(item.images) * self.formatter.most_image_tokens(item.max_tiles or self.pictures.max_tiles)
            for prompt, item in zip(self._tokenized(items, role), items, strict=True)
        ]

    def _tokenized(self, items: Sequence[Item], role: Role) -> list[TokenizedPrompt]:
        keys: list[Hashable] = [
            (role, item.text, item.instruction, len(item.images), self.formatter.max_tiles(item)) for item in items
        ]
        # another thread may add some or clear them meanwhile
        known = {key: prompt for key in keys if (prompt := self._prompts.get(key)) is not None}
        if missing := {key: n for n, key in enumerate(keys) if key not in known}:
            prompts = [self.formatter.prompt(items[n], role, position=n) for n in missing.values()]
            made = dict(zip(missing, self.formatter.tokenize(prompts), strict=True))
            if len(self._prompts) > _PROMPTS_KEPT:
                self._prompts.clear()
            self._prompts.update(made)
            known |= made
        return [known[key] for key in keys]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Items of one side of a batch that go through the model together.

    rows: where they stand among the rows of this process, queries first.
    chance_P9: of :func:`quarterlight.training.augment.draw`, for their pictures.
    """

    role: Role
    rows: list[int]
    items: list[Item]
    chance_P9: Tensor


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What a step does, before a picture is decoded.

    candidates that are equal in content share a row: ``candidate_index``, int64 [C], maps the batch's candidates to the
    ``num_distinct`` (U) rows that are embedded.
    num_pictures: over all processes.
    num_rows: of this process, queries and distinct candidates.
    chunks: this process's rows in the order in which they go through the model, each a part or two.
    dummy: a row to go through the model when other processes have more chunks than this one.
    """

    step: int
    batch: Batch
    candidate_index: Tensor
    num_distinct: int
    num_pictures: int
    num_rows: int
    chunks: list[list[Part]]
    dummy: list[Part]


@dataclass(frozen=True, kw_only=True)
class EncodedChunk:
    """The inputs of a chunk.

    inputs: of each part.  rows: of all parts, as in :class:`Part`.
    unreadable: row -> why each of its pictures that cannot be read cannot.
    """

    inputs: list[dict[str, Any]]
    rows: list[int]
    unreadable: dict[int, list[str]]


class Sampler(Protocol):
    """What a step holds, as a pure function of its number."""

    def batch(self, step: int, /) -> Batch: ...


class ContrastiveSteps:
    """The steps of a run as plans and encoded chunks, each a pure function of its number.

    chunk_tokens: tokens of a chunk, padding included, at most (but a chunk has at least one item); ``None`` makes one
        chunk of a step.
    """

    def __init__(self, sampler: Sampler, encode: ItemEncoder, *, seed: int, chunk_tokens: int | None = None) -> None:
        self.sampler = sampler
        self.encode = encode
        self.seed = seed
        self.chunk_tokens = chunk_tokens

    def plan(self, step: int) -> StepPlan:
        """What this process does in a step."""
        batch = self.sampler.batch(step)
        distinct: dict[Hashable, tuple[int, Item]] = {}
        index = [distinct.setdefault(_shown(c.item), (len(distinct), c.item))[0] for c in batch.candidates]
        queries, candidates = [query.item for query in batch.queries], [item for _, item in distinct.values()]
        pictures = [len(item.images) for item in (*queries, *candidates)]
        ends = np.cumsum([0, *pictures])
        chance_P9 = draw(int(ends[-1]), seed=self.seed, step=step)
        chances = [chance_P9[start:stop] for start, stop in pairwise(ends)]
        sides: list[tuple[Role, Sequence[Item], Sequence[Tensor]]] = [
            ("query", share(queries), share(chances[: len(queries)])),
            ("document", share(candidates), share(chances[len(queries) :])),
        ]
        parts: list[Part] = []
        first = 0
        for role, items, chance in sides:
            for group in self.groups(items, role):
                parts.append(
                    Part(
                        role=role,
                        rows=[first + n for n in group],
                        items=[items[n] for n in group],
                        chance_P9=torch.cat([chance[n] for n in group]),
                    )
                )
            first += len(items)
        whole = parts and (self.chunk_tokens is None or self._tokens(parts) <= self.chunk_tokens)
        return StepPlan(
            step=step,
            batch=batch,
            candidate_index=torch.tensor(index),
            num_distinct=len(candidates),
            num_pictures=int(ends[-1]),
            num_rows=first,
            chunks=[parts] if whole else [[part] for part in parts],
            dummy=[Part(role="query", rows=[], items=queries[:1], chance_P9=chances[0])],
        )

    def _tokens(self, parts: Sequence[Part]) -> int:
        """Of all parts together, padding included."""
        return sum(max(self.encode.num_tokens(part.items, part.role)) * len(part.items) for part in parts)

    def encoded(self, chunk: Sequence[Part]) -> EncodedChunk:
        """The tensors of a chunk."""
        inputs = [self.encode(part.items, part.role, part.chance_P9) for part in chunk]
        pairs = [(row, item) for part in chunk for row, item in zip(part.rows, part.items, strict=bool(part.rows))]
        reasons = {row: self.encode.pictures.whys(item) for row, item in pairs if item.images}
        return EncodedChunk(
            inputs=inputs,
            rows=[row for row, _ in pairs],
            unreadable={row: whys for row, whys in reasons.items() if whys},
        )

    def groups(self, items: Sequence[Item], role: Role, most: int | None = None) -> list[list[int]]:
        """Positions of the items of each chunk: the longest first within ``chunk_tokens``, or in order without it.

        most: items of a chunk; ``None`` for any number.
        """
        most = most or max(1, len(items))
        if self.chunk_tokens is None:
            return [list(range(start, min(start + most, len(items)))) for start in range(0, len(items), most)]
        length = self.encode.num_tokens(items, role)
        groups: list[list[int]] = []
        for n in sorted(range(len(items)), key=lambda n: -length[n]):
            size = len(groups[-1]) + 1 if groups else 0
            if 0 < size <= most and size * length[groups[-1][0]] <= self.chunk_tokens:
                groups[-1].append(n)
            else:
                groups.append([n])
        return groups


class StepStream:
    """The plans and chunks of the steps from ``start`` to ``stop``, in order, worked out ahead in threads.

    num_threads: 0 works each out when it is asked for.
    After a step's plan come its chunks, and if it has several, all of them once more.
    """

    def __init__(self, steps: ContrastiveSteps, start: int, stop: int, *, num_threads: int) -> None:
        self._stopped = threading.Event()
        self._ready: queue.Queue[Future[Any]] = queue.Queue(maxsize=max(2, num_threads))
        self._pool: InputThreads | None = None
        self._inline: Iterator[Future[Any]] | None = None
        if num_threads:
            self._pool = InputThreads(num_threads)
            work = _work(steps, start, stop, self._pool.submit)
            self._filler = threading.Thread(target=self._fill, args=(work,), name="prefetch", daemon=True)
            self._filler.start()
        else:
            self._inline = _work(steps, start, stop, _at_once)

    def plan(self) -> StepPlan:
        """The plan of the next step."""
        return self._next()

    def chunk(self) -> EncodedChunk:
        """The next chunk of the step whose plan was given last."""
        return self._next()

    def close(self) -> None:
        """Stops working ahead."""
        self._stopped.set()
        if self._pool is not None:
            self._pool.close()
            self._filler.join()

    def _next(self) -> Any:
        return (self._ready.get() if self._inline is None else next(self._inline)).result()

    def _fill(self, work: Iterator[Future[Any]]) -> None:
        try:
            for future in work:
                while not self._stopped.is_set():
                    try:
                        self._ready.put(future, timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if self._stopped.is_set():
                    return
        except Exception:  # of a plan, whose future has been handed on and raises it where it is used
            return


def _work(steps: ContrastiveSteps, start: int, stop: int, submit: Callable[..., Future[Any]]) -> Iterator[Future[Any]]:
    for step in range(start, stop):
        plan = submit(steps.plan, step)
        yield plan
        chunks = plan.result().chunks
        for chunk in chunks * (2 if len(chunks) > 1 else 1):
            yield submit(steps.encoded, chunk)


def _at_once(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(function(*arguments))
    return future


def _shown(item: Item) -> Hashable:
    return item.text, item.images, item.instruction, item.max_tiles
