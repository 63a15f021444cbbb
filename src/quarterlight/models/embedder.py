"""Embeddings of texts, pictures, both together and document pages.

N items, D columns, Q queries, C candidates, T tiles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from quarterlight.errors import CheckpointError, ImageError, InputError, NotFiniteError
from quarterlight.models.backbones import backbone_of
from quarterlight.models.checkpoint import (
    load_backbone,
    load_settings,
    resolve_checkpoint,
    saved_adapter,
    saved_tensors,
    vision_hash,
    weights_hash,
    what_merges,
)
from quarterlight.models.device import find_device
from quarterlight.models.inputs import InputFormatter, TokenizedPrompt
from quarterlight.models.packed import embed_packed
from quarterlight.models.pictures import Pictures
from quarterlight.models.pooling import Attention, PoolingMode, embed
from quarterlight.models.presets import preset_of
from quarterlight.models.processor import VTCProcessor
from quarterlight.models.quantized import Quantization, named_tensors, quantization_of
from quarterlight.models.settings import EmbedderSettings
from quarterlight.models.shared_prefix import Prefix, can_share, embed_after, read_prefix
from quarterlight.models.tiles import Grid, Tiles, num_tiles
from quarterlight.models.tokenizer import with_markers
from quarterlight.prompts import Role, chat_template
from quarterlight.records import ArchiveMember, ImageSource, Item, ItemLike

if TYPE_CHECKING:
    from quarterlight.models.compiled import Compiled

WINDOW_BYTES = 64 * 2**20
"""Decoded tiles waiting for the model: one window of at most so many bytes is computed while the next is decoded."""

FEATURE_CACHE_BYTES = 64 * 2**20
"""Features of the pictures seen last in a call, kept for items that show the same picture with other words."""

PREFIX_CACHE_BYTES = 64 * 2**20
"""Keys and values of the beginnings that rows of a call have in common."""


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it (GPUs since Ampere; CPUs with AMX or AVX512-BF16), float32 elsewhere:
    in float16 some models overflow."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return torch.bfloat16 if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32  # a T4 or V100 takes bfloat16, but only emulates it
    return torch.bfloat16


def best_tokens_per_batch(device: torch.device) -> int:
    """8,192 on a GPU; 2,048 on a CPU, where larger batches fall out of the caches and are padded more.

    With nano on one core, a fourth less time per item than 8,192 (``benchmarks/LOG.md``).
    """
    return 2048 if device.type == "cpu" else 8192


def tokens_of_a_pass(device: torch.device) -> int:
    """What one more pass through all layers costs, in tokens: what it spares must be worth as many.

    On a CPU it takes as long as 30 tokens more in a batch of nano (``benchmarks/LOG.md``).  On a GPU, where a pass of
    few tokens takes as long as one of many, the number is an estimate.
    """
    return 64 if device.type == "cpu" else 2048


@dataclass
class Work:
    """What an embedder has done since it was made; items that a call has seen before are not counted again.

    rows, tokens: items that went through the language model, and their tokens without padding.
    batches, padding: in how many passes, and the tokens that made the rows of a pass alike in length.
    rows_packed: items that did so in one sequence, without padding.
    rows_sharing, tokens_spared: those whose beginning was read for other rows too, and tokens not read for that reason.
    pictures, pictures_spared: those of the rows, and those of them that did not go through the vision tower because the
        call had seen the same a moment before.
    layers_compiled: how often a layer ran as ``torch.compile`` had made it.
    pictures_ahead: files and pictures that other threads had read and cut when the model was done with those before,
        so that it did not wait for them; never those that a call begins with.
    """

    rows: int = 0
    tokens: int = 0
    batches: int = 0
    padding: int = 0
    rows_packed: int = 0
    rows_sharing: int = 0
    tokens_spared: int = 0
    pictures: int = 0
    pictures_spared: int = 0
    layers_compiled: int = 0
    pictures_ahead: int = 0


class Embedder:
    """One model for all modalities.

    >>> embedder = Embedder("nano")                                                         # doctest: +SKIP
    >>> query = embedder.encode_query("a red apple")                                        # doctest: +SKIP
    >>> pages = embedder.encode_document([Item(image="page.png", max_tiles=4)])             # doctest: +SKIP
    >>> embedder.similarity(query, pages)                                                   # doctest: +SKIP
    """

    _folder: Path | None = None  # of a model in memory
    compiled: Compiled | None = None
    """What of the model is compiled, if that was asked for."""
    _released: Mapping[str, Any] | None = None  # what a preset changed in the model of the folder

    def __init__(
        self,
        model: str | os.PathLike[str] = "nano",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        visual_token_compression: int | None = None,
        vision_token_merging: float | None = None,
        truncate_dim: int | None = None,
        tokens_per_batch: int | None = None,
        num_workers: int = 2,
        packed: bool = False,
        shared_prefix: bool = True,
        decode_margin: int | None = None,
        preset: str | None = None,
        quantization: Quantization | None = None,
        compile: bool | str = False,
    ) -> None:
        """
        model: a bundled name, a folder or a hub id.
        device: ``None`` takes a GPU if there is one.  dtype: ``None`` takes :func:`best_dtype`.
        visual_token_compression: replaces the s that the checkpoint was saved with.
        vision_token_merging: replaces the saved share of the patches that are merged inside the vision tower, 0 for
            none; see :mod:`quarterlight.models.merging`.  For InternVL only.
        truncate_dim: embeddings keep so many leading columns and are normalised again; for Matryoshka-trained models.
        tokens_per_batch: visual and text tokens, padding included, that go through the language model at once;
            ``None`` takes :func:`best_tokens_per_batch`.
        num_workers: threads that decode and tile pictures while the model computes; 0 does so in between.
        packed: rows go through the language model one after the other in one sequence, without padding, rather than
            side by side; see :mod:`quarterlight.models.packed`.  Changes embeddings by rounding only.
        shared_prefix: what many items of a call begin with, such as system prompt and instruction, goes through the
            language model once; see :mod:`quarterlight.models.shared_prefix`.  Changes embeddings by rounding only.
            Not possible, and not done, with bidirectional attention, mean pooling or ``packed``.
        decode_margin: allows pictures that become one tile to be shrunk by a whole factor while they are decoded (JPEGs
            faster) as long as their shortest side keeps at least so many times the tile's.  Changes embeddings: with 4,
            those of nano by less than 1e-3 of cosine, with 2 by up to 4e-3 (``benchmarks/LOG.md``); so ``None``, which
            keeps every pixel, is the default, and another value changes ``model_hash``.
        preset: name of one in :mod:`quarterlight.models.presets`, for a folder of weights that others released;
            ``None`` finds it by the name of the model, where that has one.
        quantization: ``"int8"`` keeps the weights of layers as int8, which takes a quarter of the memory of float32;
            see :mod:`quarterlight.models.quantized`.  Needs torchao.  Changes embeddings, nano's by up to 1e-4 of
            cosine (``docs/performance.md``), and so ``model_hash``.
        compile: lets layers run as ``torch.compile`` makes them, see :mod:`quarterlight.models.compiled`; a string is a
            mode of it, such as ``"reduce-overhead"``.  Takes a minute or more before this returns, less where its cache
            on disk has what it needs.  Changes embeddings by rounding only.
        Raises CheckpointError when there is no such model or preset, InputError for an impossible ``truncate_dim``
            or another setting that does not exist.
        """
        folder = resolve_checkpoint(model)
        place = find_device(device)
        released = preset_of(model, folder, preset)
        backbone, processor = load_backbone(
            folder,
            visual_token_compression=visual_token_compression,
            vision_token_merging=vision_token_merging,
            dtype=dtype or best_dtype(place),
            device=place,
            tower=released.tower if released else None,
            quantization=quantization,
        )
        if released:
            settings = released.settings
            with_markers(backbone, processor.tokenizer, seed=released.marker_seed)
            self._released = {"marker_seed": released.marker_seed, "tower": dict(released.tower)}
        else:
            settings = load_settings(folder)
        self._assemble(backbone, processor, settings, str(model), truncate_dim, tokens_per_batch, num_workers)
        self.packed, self.shared_prefix = packed, shared_prefix
        if decode_margin is not None:
            if decode_margin < 1:
                raise InputError(f"decode_margin must be at least 1, got {decode_margin}.")
            self._formatter = InputFormatter(processor, settings, decode_margin=decode_margin)
        self._folder = folder
        if compile:
            from quarterlight.models.compiled import compile_layers  # seconds of import

            mode = compile if isinstance(compile, str) else None
            self.compiled = compile_layers(self.model, self._read, mode=mode, on_call=self._count_compiled)

    @classmethod
    def from_model(
        cls,
        model: Any,
        processor: VTCProcessor,
        settings: EmbedderSettings,
        *,
        name: str = "unsaved",
        folder: Path | None = None,
        truncate_dim: int | None = None,
        tokens_per_batch: int | None = None,
        num_workers: int = 2,
        packed: bool = False,
        shared_prefix: bool = True,
    ) -> Embedder:
        """An embedder around a model in memory, whose language head, if any, is not used. Put it in ``eval`` mode.

        folder: where it was loaded from, so that its hash is that of what was saved.
        """
        embedder = cls.__new__(cls)
        embedder._assemble(model.base_model, processor, settings, name, truncate_dim, tokens_per_batch, num_workers)
        embedder.packed, embedder.shared_prefix = packed, shared_prefix
        embedder._folder = folder
        return embedder

    def _assemble(
        self,
        model: Any,
        processor: VTCProcessor,
        settings: EmbedderSettings,
        name: str,
        truncate_dim: int | None,
        tokens_per_batch: int | None,
        num_workers: int,
    ) -> None:
        if tokens_per_batch is None:
            tokens_per_batch = best_tokens_per_batch(model.device)
        if tokens_per_batch < 1 or num_workers < 0:
            raise InputError(
                "tokens_per_batch must be at least 1 and num_workers at least 0, "
                f"got {tokens_per_batch} and {num_workers}."
            )
        self.name = name
        self.model = model
        self.processor = processor
        self.settings = settings
        self.tokens_per_batch = tokens_per_batch
        self.work = Work()

        self._backbone = backbone_of(model.config)
        self._formatter = InputFormatter(processor, settings)
        self._workers = ThreadPoolExecutor(num_workers, "quarterlight-decode") if num_workers else _InPlace()
        self._truncate_dim = self._checked_dim(truncate_dim)

    @property
    def shares_prefixes(self) -> bool:
        """Whether common beginnings are read once, where that spares enough."""
        causal_last = (Attention.CAUSAL, PoolingMode.LAST_TOKEN)
        possible = (self.settings.attention, self.settings.pooling) == causal_last and can_share(self.model)
        return self.shared_prefix and possible and not self.packed

    @property
    def dimension(self) -> int:
        """Columns of an embedding."""
        return self._truncate_dim or self._full_dimension

    @property
    def max_tiles(self) -> int:
        """The most tiles of a picture whose item does not say."""
        return self.settings.max_tiles

    @property
    def pictures(self) -> Pictures:
        """How it reads pictures, for those who read files ahead of it."""
        return self._formatter.pictures

    @cached_property
    def model_hash(self) -> str:
        """SHA-256, in hex, of the weights and all else that changes an embedding; device and dtype, which change it by
        rounding only, are left out. Reads all weights the first time."""
        weights = saved_tensors(self._folder) if self._folder else named_tensors(self.model)
        settings = self.settings.what_matters()
        for name in self._backbone.unheeded:
            settings.pop(name, None)
        recipe = {
            "weights": weights_hash(weights),
            "settings": settings,
            "template": chat_template(
                image=self.processor.picture,
                defaults=self.settings.instructions,
                style=self.settings.prompt_style,
                marked=self.settings.marked,
            ),
            "tokenizer": self.processor.tokenizer.backend_tokenizer.to_str(),
            "image_processor": self._backbone.picture_settings(self.processor.image_processor),
            "visual_token_compression": self.model.config.visual_token_compression,
            "truncate_dim": self._truncate_dim,
            **what_merges(self.model.config),
        }
        if self._folder and (adapter := saved_adapter(self._folder)):
            recipe["adapter"] = adapter
        if self.pictures.decode_margin:
            recipe["decode_margin"] = self.pictures.decode_margin
        if self._released:
            recipe["released"] = self._released
        if (quantization := quantization_of(self.model)) is not None:
            recipe["quantization"] = quantization
        return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def vision_hash(self) -> str:
        """SHA-256, in hex, of all that changes a visual token: vision tower, connector, s, and how tiles are made."""
        return vision_hash(self._folder, self.model, self.processor)

    def encode_query(
        self,
        items: ItemLike | Sequence[ItemLike],
        *,
        instruction: str | None = None,
        truncate_dim: int | None = None,
        show_progress: bool = False,
    ) -> np.ndarray:
        """Embeddings of what is searched with: float32 ``[N, D]``, rows of norm 1, in the order of ``items``.

        items: one or several of: text (a string, also if it looks like a path), a ``pathlib.Path`` or PIL image, an
            :class:`Item` or a mapping of its fields, such as ``{"text": ..., "image": ...}``.
        instruction: for items that have none of their own; ``None`` takes the checkpoint's default for their modality.
        truncate_dim: as in the constructor, for this call.
        Raises InputError or ImageError, naming the position, for an item that cannot be used; NotFiniteError, naming
            the positions, when some embeddings are not numbers, and CheckpointError when none is.
        """
        return self._encode(items, "query", instruction, truncate_dim, show_progress)

    def encode_document(
        self,
        items: ItemLike | Sequence[ItemLike],
        *,
        instruction: str | None = None,
        truncate_dim: int | None = None,
        show_progress: bool = False,
    ) -> np.ndarray:
        """Embeddings of what is searched for; arguments and result as in :meth:`encode_query`."""
        return self._encode(items, "document", instruction, truncate_dim, show_progress)

    def encode_document_with_visual_tokens(
        self, items: ItemLike | Sequence[ItemLike], *, instruction: str | None = None
    ) -> tuple[np.ndarray, list[np.ndarray | None]]:
        """As :meth:`encode_document`, and what the language model was given of the pictures of each item.

        The latter are the visual tokens of all tiles of all its pictures in order, float16 ``[tokens, columns]``, which
        :class:`quarterlight.models.reranker.Reranker` takes in place of the pictures; ``None`` for an item without any.
        Of a Qwen-VL each picture's begin with a row that says how they stand.
        """
        tokens: dict[int, np.ndarray] = {}
        rows_ND = self._encode(items, "document", instruction, None, False, tokens)
        return rows_ND, [tokens.get(position) for position in range(len(rows_ND))]

    @torch.inference_mode()
    def visual_tokens(self, items: Sequence[Item]) -> list[VisualTokens]:
        """What the language model is given of the pictures of each item; nothing more is computed.

        Raises ImageError, naming the position, for a picture that cannot be read.
        """
        where = [position for position, one in enumerate(items) if one.images]
        shown = [Item(image=items[n].image, max_tiles=items[n].max_tiles) for n in where]
        blank = torch.empty(
            0,
            self._backbone.tokens_per_row(self.model.config),
            self._backbone.width(self.model.config),
            dtype=self.model.dtype,
            device=self.model.device,
        )
        found = [VisualTokens(blank, ()) for _ in items]
        seen = LastUsed(FEATURE_CACHE_BYTES)
        with contextlib.closing(self._windows(self._plan(shown, "document", ""), where)) as windows:
            for window in windows:
                features = iter(self._see([picture for job in window for picture in job.pictures], seen))
                for job in window:
                    parts = [next(features) for _ in job.pictures]
                    found[where[job.position]] = VisualTokens(torch.cat(parts), tuple(one.grid for one in job.pictures))
                    job.pictures.clear()
        return found

    def similarity(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Cosine of every query with every document, float32 ``[Q, C]``, of embeddings of norm 1; higher is closer."""
        queries, documents = (np.atleast_2d(np.asarray(one, dtype=np.float32)) for one in (queries, documents))
        if queries.shape[1] != documents.shape[1]:
            raise InputError(
                f"Queries have {queries.shape[1]} columns, documents {documents.shape[1]}: were they embedded by the "
                "same model, with the same truncate_dim?"
            )
        return queries @ documents.T

    @property
    def _full_dimension(self) -> int:
        return int(self.model.config.text_config.hidden_size)

    def _checked_dim(self, truncate_dim: int | None) -> int | None:
        if truncate_dim is not None and not 1 <= truncate_dim <= self._full_dimension:
            raise InputError(f"truncate_dim must be from 1 to {self._full_dimension}, got {truncate_dim}.")
        return truncate_dim

    def _encode(
        self,
        items: ItemLike | Sequence[ItemLike],
        role: Role,
        instruction: str | None,
        truncate_dim: int | None,
        show_progress: bool,
        tokens: dict[int, np.ndarray] | None = None,
    ) -> np.ndarray:
        columns = self._checked_dim(truncate_dim) or self.dimension
        jobs = self._plan(as_list(items), role, instruction)
        embeddings_ND = np.empty((len(jobs), columns), dtype=np.float32)
        done: dict[Any, int] = {}  # what the model saw -> the row of its embedding
        shown: dict[Any, np.ndarray] | None = None if tokens is None else {}  # and the visual tokens of its pictures
        seen, prefixes = LastUsed(FEATURE_CACHE_BYTES), LastUsed(PREFIX_CACHE_BYTES)
        with (
            contextlib.closing(self._windows(jobs)) as windows,
            tqdm(total=len(jobs), desc=f"embed {role}", unit="item", disable=not show_progress) as progress,
        ):
            for window in windows:
                fresh = {job.key: job for job in window if job.key not in done}
                for opening, alike in self._groups(list(fresh.values()), prefixes):
                    for batch in self._batches(sorted(alike, key=self._num_tokens), len(opening)):
                        rows_BD = self._embed(batch, opening, prefixes, seen, shown)[:, :columns]
                        rows_BD /= np.linalg.norm(rows_BD, axis=1, keepdims=True)
                        embeddings_ND[[job.position for job in batch]] = rows_BD
                        done.update((job.key, job.position) for job in batch)
                for job in window:
                    embeddings_ND[job.position] = embeddings_ND[done[job.key]]
                    if tokens is not None and shown is not None and job.key in shown:
                        tokens[job.position] = shown[job.key]
                    job.pictures.clear()
                progress.update(len(window))
        if wrong := np.flatnonzero(~np.isfinite(embeddings_ND).all(axis=1)).tolist():
            if len(wrong) == len(jobs):
                raise CheckpointError(f"{self.name} gives embeddings that are not numbers: its weights are damaged.")
            positions = ", ".join(map(str, wrong))
            raise NotFiniteError(f"{self.name} gives embeddings that are not numbers for items {positions}.", wrong)
        return embeddings_ND

    def _plan(self, items: Sequence[ItemLike], role: Role, instruction: str | None) -> list[_Job]:
        """The items with their prompts, pictures still to be decoded, those with most tokens first."""
        parsed, prompts = [], []
        for position, value in enumerate(items):
            try:
                parsed.append(Item.parse(value))
            except InputError as error:
                raise InputError(f"Item {position}: {error}") from error
            prompts.append(self._formatter.prompt(parsed[-1], role, instruction, position))
        jobs = [
            _Job(position, item, prompt, self._formatter.max_tiles(item))
            for position, (item, prompt) in enumerate(zip(parsed, self._formatter.tokenize(prompts), strict=True))
        ]
        return sorted(jobs, key=self._most_tokens, reverse=True)

    def _windows(
        self, jobs: Sequence[_Job], positions: Sequence[int] | None = None
    ) -> Generator[list[_Job], None, None]:
        """Runs of jobs with their pictures decoded; while one is being used, the pictures of the next are decoded.

        positions: by which messages call the jobs, if not by their own.
        """
        waiting: list[_Job] = []
        try:
            for window in chain(self._runs(jobs), [[]]):
                self._decode(window)
                if waiting:
                    yield self._collect(waiting, positions)
                    self._count_ahead(window)
                waiting = window
        finally:  # after an error nobody waits for the others, and another call need not wait behind them
            for job in jobs:
                for future in job.futures:
                    future.cancel()

    def _runs(self, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
        """Jobs whose decoded tiles take ``WINDOW_BYTES``, or that are two batches, whichever are fewer."""
        height, width = self.processor.image_processor.tile_pixels
        bytes_per_tile = height * width * 3
        run: list[_Job] = []
        num_bytes = num_tokens = 0
        for job in jobs:
            run.append(job)
            num_bytes += len(job.item.images) * self._formatter.most_tiles(job.max_tiles) * bytes_per_tile
            num_tokens += self._most_tokens(job)
            if num_bytes >= WINDOW_BYTES or num_tokens >= 2 * self.tokens_per_batch:
                yield run
                run, num_bytes, num_tokens = [], 0, 0
        if run:
            yield run

    def _decode(self, window: Sequence[_Job]) -> None:
        """Hands the pictures of a window to the workers, each source once."""
        futures: dict[Any, Future[_Picture]] = {}
        for job in window:
            for source in job.item.images:
                # Opened pictures and bytes are the same if they are the same object, files if they have the same name.
                named = isinstance(source, (str, os.PathLike, ArchiveMember))
                key = (source if named else id(source), job.max_tiles)
                if key not in futures:
                    futures[key] = self._workers.submit(self._picture, source, job.max_tiles)
                job.futures.append(futures[key])

    def _count_ahead(self, window: Sequence[_Job]) -> None:
        """Counts the pictures of a window that are ready, right after the model is done with the window before."""
        if not isinstance(self._workers, _InPlace):
            self.work.pictures_ahead += len({future for job in window for future in job.futures if future.done()})

    def _picture(self, source: ImageSource, max_tiles: int) -> _Picture:
        tiles = self._formatter.cut(source, max_tiles)
        digest = hashlib.blake2b(tiles.pixels.data, digest_size=16)
        digest.update(repr(tiles.grid).encode())
        return _Picture(tiles, digest.digest())

    def _collect(self, window: list[_Job], positions: Sequence[int] | None) -> list[_Job]:
        for job in window:
            try:
                job.pictures.extend(future.result() for future in job.futures)
            except ImageError as error:
                position = job.position if positions is None else positions[job.position]
                raise ImageError(f"Item {position}: {error}") from error
            job.futures.clear()
            job.key = (job.prompt, *(picture.digest for picture in job.pictures))
        return window

    def _groups(self, jobs: Sequence[_Job], prefixes: LastUsed) -> list[tuple[tuple[int, ...], list[_Job]]]:
        """Jobs that are batched together, with the beginning that is read once for them, which may be empty.

        Those with the same beginning are a group if that spares enough; all others are one, with what is left in
        common.  prefixes: those that were read before, of which another use spares all of it.
        """
        if not self.shares_prefixes:
            return [((), list(jobs))]
        enough = tokens_of_a_pass(self.model.device)

        def spares(opening: tuple[int, ...], rows: int) -> bool:
            return bool(opening) and (opening in prefixes or (rows - 1) * len(opening) >= enough)

        alike: dict[tuple[int, ...], list[_Job]] = {}
        for job in jobs:
            alike.setdefault(job.prompt.opening, []).append(job)
        groups = [(opening, some) for opening, some in alike.items() if spares(opening, len(some))]
        apart = [opening for opening, some in alike.items() if not spares(opening, len(some))]
        if apart:
            rest = [job for opening in apart for job in alike[opening]]
            common = _common(apart)
            groups.append((common if spares(common, len(rest)) else (), rest))
        return groups

    def _batches(self, jobs: Sequence[_Job], num_read: int = 0) -> Iterator[list[_Job]]:
        """Runs of jobs, shortest first, of ``tokens_per_batch`` at most when padded to the longest of the run.

        A run ends before its padding would cost more than one more pass.
        num_read: their first tokens, which do not count.
        """
        most_padding = tokens_of_a_pass(self.model.device)
        batch: list[_Job] = []
        total = 0
        for job in jobs:
            longest = self._num_tokens(job) - num_read
            size = total + longest if self.packed else longest * (len(batch) + 1)
            if batch and (size > self.tokens_per_batch or size - total - longest > most_padding):
                yield batch
                batch, total = [], 0
            batch.append(job)
            total += longest
        if batch:
            yield batch

    @torch.inference_mode()
    def _embed(
        self,
        batch: Sequence[_Job],
        opening: tuple[int, ...],
        prefixes: LastUsed,
        seen: LastUsed,
        shown: dict[Any, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Embeddings of a batch, float32 ``[B, D]``, all columns.

        opening: what all begin with and is read once; it is kept in ``prefixes``.
        shown: where the visual tokens of each job are put, by its key.
        """
        grids = [[picture.grid for picture in job.pictures] for job in batch]
        inputs = self._collated([job.prompt for job in batch], grids)
        if pictures := [picture for job in batch for picture in job.pictures]:
            parts = self._see(pictures, seen)
            inputs["visual_tokens"] = torch.cat(parts)
            if shown is not None:
                rest, config = iter(parts), self.model.config
                for job in batch:
                    if job.pictures:
                        kept = [self._backbone.stored(config, next(rest), one.grid) for one in job.pictures]
                        tokens = torch.cat(kept)
                        shown[job.key] = tokens.to(torch.float16).cpu().numpy()
        self.work.batches += 1
        self.work.rows += len(batch)
        lengths = [self._num_tokens(job) for job in batch]
        self.work.tokens += sum(lengths)
        self.work.padding += 0 if self.packed else max(lengths) * len(batch) - sum(lengths)
        if opening:
            prefix: Prefix
            if opening in prefixes:
                prefix = prefixes[opening]
                self.work.tokens_spared += len(opening)
            else:
                prefix = read_prefix(self.model, inputs, len(opening))
                prefixes.put(opening, prefix)
            self.work.rows_sharing += len(batch)
            self.work.tokens_spared += (len(batch) - 1) * len(opening)
            return embed_after(self.model, inputs, prefix).cpu().numpy()
        self.work.rows_packed += len(batch) * self.packed
        return self._compute(inputs).cpu().numpy()

    def _collated(self, prompts: Sequence[TokenizedPrompt], grids: Sequence[Sequence[Grid]]) -> dict[str, Any]:
        inputs = self._formatter.collate(prompts, grids)
        return {name: on_device(tensor, self.model.device) for name, tensor in inputs.items()}

    def _compute(self, inputs: Mapping[str, Any]) -> Tensor:
        compute = embed_packed if self.packed else embed
        return compute(self.model, inputs, pooling=self.settings.pooling, attention=self.settings.attention)

    def _read(self, texts: Sequence[str]) -> None:
        """Runs texts through the language model as one batch, which counts as no work."""
        prompts = self._formatter.tokenize([self._formatter.prompt(Item(text=one), "document") for one in texts])
        self._compute(self._collated(prompts, [[] for _ in texts]))

    def _see(self, pictures: Sequence[_Picture], seen: LastUsed) -> list[Tensor]:
        """The visual tokens of pictures, ``[n, k, W]`` each; the same picture goes through the tower once."""
        unseen = {one.digest: one for one in pictures if one.digest not in seen}
        features = {one.digest: seen[one.digest] for one in pictures if one.digest in seen}
        self.work.pictures += len(pictures)
        self.work.pictures_spared += len(pictures) - len(unseen)
        if unseen:
            tiles_THW3 = torch.from_numpy(np.concatenate([picture.tiles.pixels for picture in unseen.values()]))
            config, backbone = self.model.config, self._backbone
            grids = [picture.grid for picture in unseen.values()]
            runs = backbone.split(grids, max(1, self.tokens_per_batch // backbone.patches(config)))
            normalize = self.processor.image_processor.normalize_tiles
            # all copies are begun before the first is used, so that later ones travel while the tower computes
            sent = [
                on_device(chunk, self.model.device)
                for chunk in tiles_THW3.split([sum(map(num_tiles, run)) for run in runs])
            ]
            chunks = [backbone.see(self.model, normalize(chunk), run) for chunk, run in zip(sent, runs, strict=True)]
            parts = torch.cat(chunks).split([backbone.num_rows(config, grid) for grid in grids])
            for digest, part in zip(unseen, parts, strict=True):
                features[digest] = part
                seen.put(digest, part.clone())
        return [features[picture.digest] for picture in pictures]

    def _count_compiled(self) -> None:
        self.work.layers_compiled += 1

    def _num_tokens(self, job: _Job) -> int:
        return job.prompt.num_tokens + sum(self._formatter.num_image_tokens(picture.grid) for picture in job.pictures)

    def _most_tokens(self, job: _Job) -> int:
        return job.prompt.num_tokens + len(job.item.images) * self._formatter.most_image_tokens(job.max_tiles)


@dataclass(frozen=True)
class VisualTokens:
    """What the language model is given of the pictures of one item.

    tokens: ``[n, k, W]`` of all its pictures in order, see :class:`quarterlight.models.backbones.backbone.Backbone`;
        for an InternVL ``[tiles, tokens of a tile, columns]``.
    tiles: of each picture, or how it was cut.
    """

    tokens: Tensor
    tiles: tuple[Grid, ...]

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return self.tokens.nbytes


@dataclass
class _Picture:
    tiles: Tiles
    digest: bytes

    @property
    def grid(self) -> Grid:
        return self.tiles.grid


@dataclass
class _Job:
    """An item on its way to its embedding."""

    position: int
    item: Item
    prompt: TokenizedPrompt
    max_tiles: int
    futures: list[Future[_Picture]] = field(default_factory=list)
    pictures: list[_Picture] = field(default_factory=list)
    key: Any = None


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there.  To a GPU it travels from memory that is not paged, while this goes on; what is computed of it
    there waits (PyTorch's tutorial on ``pin_memory`` and ``non_blocking``).  On a CPU it is the tensor itself."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _common(openings: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all begin with."""
    first, last = min(openings), max(openings)  # in alphabetical order, all others begin with it too
    alike = next((n for n, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), None)
    return first if alike is None else first[:alike]


class _InPlace:
    """Stands in for a pool of threads when there are none."""

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


class LastUsed:
    """Tensors, or what else has ``nbytes``, by key; the least recently used are dropped when they take more than
    ``max_bytes`` together."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._tensors: OrderedDict[Hashable, Any] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tensors

    def __getitem__(self, key: Hashable) -> Any:
        self._tensors.move_to_end(key)
        return self._tensors[key]

    def put(self, key: Hashable, tensor: Any) -> None:
        self._tensors[key] = tensor
        self._num_bytes += tensor.nbytes
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= self._tensors.popitem(last=False)[1].nbytes


def as_list(items: ItemLike | Sequence[ItemLike]) -> Sequence[ItemLike]:
    if isinstance(items, (str, bytes, os.PathLike, Image.Image, Mapping, Item, ArchiveMember)):
        return [items]  # type: ignore[list-item]
    if not isinstance(items, Iterable):
        raise InputError(
            f"Expected an item (text, a pathlib.Path, a PIL image, a mapping or an Item) or several, got "
            f"{type(items).__name__}."
        )
    return list(items)
