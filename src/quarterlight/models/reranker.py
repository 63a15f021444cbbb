"""Scores of candidates for a query, by a model that reads both together.

Magic-MM-Embedding, section 3.4, on the trunk of the embedder.  What can be shared is worked out once: the template's
beginning for all queries, the rest of a query's prefix for all of its candidates, the visual tokens of a picture for
all queries (or when it was indexed).  What remains for a candidate is one short pass through the language model, of
whose last position two logits are taken.

C candidates, B of them together, L tokens of the longest, P tokens of a prefix, D columns.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from quarterlight.errors import CheckpointError, ImageError, InputError
from quarterlight.models.backbones import backbone_of
from quarterlight.models.checkpoint import (
    RERANKER,
    RERANKER_ADAPTER,
    load_backbone,
    load_reranker_settings,
    resolve_checkpoint,
    saved_adapter,
    saved_tensors,
    vision_hash,
    weights_hash,
)
from quarterlight.models.device import find_device
from quarterlight.models.embedder import Embedder, LastUsed, VisualTokens, as_list, best_dtype
from quarterlight.models.inputs import TokenizedPrompt
from quarterlight.models.pictures import Pictures
from quarterlight.models.processor import VTCProcessor
from quarterlight.models.rerank_inputs import AnswerTokens, RerankFormatter
from quarterlight.models.settings import EmbedderSettings, RerankerSettings
from quarterlight.models.shared_prefix import repeated
from quarterlight.models.tiles import Grid
from quarterlight.prompts import rerank_chat_template
from quarterlight.records import ArchiveMember, Item, ItemLike

LIST_SIZE = 6
"""Candidates that are listed together, as many as were in training at most (paper: one positive, up to 5 negatives)."""

QUERIES_PER_WINDOW = 64
"""Queries whose pictures, and those of their candidates, are read together."""

TOKEN_CACHE_BYTES = 256 * 2**20
"""Visual tokens of pictures that are kept within a call for other queries."""

StoredTokens: TypeAlias = "npt.NDArray[np.floating[Any]] | None"
"""Visual tokens of all tiles of a picture, float ``[tokens, D]``; ``None`` where they are still to be worked out."""

_SIDES = ("its query", "its candidate")

_log = logging.getLogger(__name__)


def reranker_folder(model: str | os.PathLike[str]) -> Path:
    """The folder of a reranker: the one named, or the one inside that of an embedder.

    Raises CheckpointError when there is no such model.
    """
    folder = resolve_checkpoint(model)
    inside = folder / RERANKER
    return inside if (inside / "config.json").is_file() else folder


def has_reranker(model: str | os.PathLike[str]) -> bool:
    """Whether a bundled name, folder or hub id is a reranker or has one inside."""
    folder = reranker_folder(model)
    try:
        load_reranker_settings(folder)
    except CheckpointError:
        return False
    return True


class Reranker:
    """A query and a candidate in, how well they match out.

    >>> reranker = Reranker("runs/2b/rerank")                                               # doctest: +SKIP
    >>> reranker.score("a red apple", [Path("apple.jpg"), "a pear"])                        # doctest: +SKIP
    array([0.93, 0.02], dtype=float32)
    >>> reranker.rank("a red apple", [Path("apple.jpg"), "a pear"], top_k=1)                # doctest: +SKIP
    [{'corpus_id': 0, 'score': 0.93}]
    """

    _folder: Path | None = None  # of a model in memory

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        tokens_per_batch: int = 8192,
        num_workers: int = 2,
    ) -> None:
        """
        model: a bundled name, a folder or a hub id, of a reranker or of an embedder with a reranker inside.
        device: ``None`` takes a GPU if there is one.  dtype: ``None`` takes :func:`best_dtype`.
        tokens_per_batch: of candidates, their prefix and padding included, that go through the language model at once.
        num_workers: threads that decode and tile pictures while the model computes; 0 does so in between.
        Raises CheckpointError when there is no such model, or its tokenizer spells an answer in several tokens.
        """
        folder = reranker_folder(model)
        settings = load_reranker_settings(folder)
        place = find_device(device)
        backbone, processor = load_backbone(folder, dtype=dtype or best_dtype(place), device=place, language_head=True)
        self._assemble(backbone, processor, settings, str(model), tokens_per_batch, num_workers)
        self._folder = folder

    @classmethod
    def from_model(
        cls,
        model: Any,
        processor: VTCProcessor,
        settings: RerankerSettings,
        *,
        name: str = "unsaved",
        folder: Path | None = None,
        tokens_per_batch: int = 8192,
        num_workers: int = 2,
    ) -> Reranker:
        """A reranker around a model with a language head in memory. Put it in ``eval`` mode.

        folder: where it was loaded from, so that its hash is that of what was saved.
        """
        reranker = cls.__new__(cls)
        reranker._assemble(model, processor, settings, name, tokens_per_batch, num_workers)
        reranker._folder = folder
        return reranker

    def _assemble(
        self,
        model: Any,
        processor: VTCProcessor,
        settings: RerankerSettings,
        name: str,
        tokens_per_batch: int,
        num_workers: int,
    ) -> None:
        self.name = name
        self.model = model
        self.processor = processor
        self.settings = settings
        self.tokens_per_batch = tokens_per_batch
        self.answers = AnswerTokens.of(processor.tokenizer, name)
        self.formatter = RerankFormatter(processor, settings)
        # makes visual tokens of pictures; its prompts are never read
        self.eyes = Embedder.from_model(
            model,
            processor,
            EmbedderSettings(max_tiles=settings.max_tiles, max_pixels=settings.max_pixels),
            tokens_per_batch=tokens_per_batch,
            num_workers=num_workers,
        )
        self._backbone = backbone_of(model.config)
        self._openings: dict[
            tuple[Any, ...], tuple[int, DynamicCache]
        ] = {}  # what they depend on -> tokens, their cache

    @property
    def pictures(self) -> Pictures:
        """How it reads pictures, for those who read files ahead of it."""
        return self.eyes.pictures

    @cached_property
    def model_hash(self) -> str:
        """SHA-256, in hex, of the weights and all else that changes a score beyond rounding."""
        weights = saved_tensors(self._folder) if self._folder else sorted(self.model.state_dict().items())
        settings = self.settings.to_dict()
        for name in ("method", "fusion_weight", "fusion_weights", *self._backbone.unheeded):
            settings.pop(name)
        recipe = {
            "weights": weights_hash(weights),
            "vision": self.vision_hash,
            "settings": settings,
            "template": rerank_chat_template(image=self.processor.picture, instructions=self.settings.instructions),
            "tokenizer": self.processor.tokenizer.backend_tokenizer.to_str(),
            "adapter": saved_adapter(self._folder, RERANKER_ADAPTER) if self._folder else {},
        }
        return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def vision_hash(self) -> str:
        """SHA-256, in hex, of all that changes a visual token; an embedder of the same one shares its eyes."""
        return vision_hash(self._folder, self.model, self.processor)

    def score(
        self,
        query: ItemLike,
        candidates: Sequence[ItemLike],
        *,
        instruction: str | None = None,
        visual_tokens: Sequence[StoredTokens] | None = None,
    ) -> npt.NDArray[np.float32]:
        """How likely each candidate meets the query: float32 ``[C]`` in [0, 1].

        The softmax over the logits of Yes and No, as the first word of the answer.
        query, candidates: text, a ``pathlib.Path`` or PIL image, an :class:`Item` or a mapping of its fields.
        instruction: what the query looks for, unless it says so itself; ``None`` takes the checkpoint's default.
        visual_tokens: of each candidate with one picture, which is then not read; ``None`` for others.
        Raises InputError or ImageError, naming the position, for a candidate that cannot be used.
        """
        query, items, seen = self._seen(query, candidates, visual_tokens)
        scores_C, num_cut = self._scores(query, items, instruction, seen)
        self._say_cut(num_cut)
        return scores_C

    def predict(
        self,
        pairs: Sequence[tuple[ItemLike, ItemLike]],
        *,
        instruction: str | None = None,
        show_progress: bool = False,
    ) -> npt.NDArray[np.float32]:
        """The scores of pairs of a query and a candidate, float32 ``[N]``, as :meth:`score` gives them.

        Pairs of the same query share its prefix, wherever they stand.  Errors name the position of a pair.
        """
        parsed = []
        for position, pair in enumerate(pairs):
            if isinstance(pair, (str, bytes, Mapping)) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise InputError(f"Pair {position}: expected a query and a candidate, got {pair!r}.")
            query, candidate = (
                _parsed(one, f"Pair {position}, {what}") for one, what in zip(pair, _SIDES, strict=True)
            )
            parsed.append((query, candidate))
        groups: dict[Hashable, list[int]] = {}
        for position, (one, _) in enumerate(parsed):
            groups.setdefault(_key(one), []).append(position)
        scores_N = np.empty(len(parsed), np.float32)
        num_cut = 0
        known = LastUsed(TOKEN_CACHE_BYTES)
        waiting = list(groups.values())
        with tqdm(total=len(parsed), desc="rerank", unit="pair", disable=not show_progress) as progress:
            for window in self._windows(waiting, [candidate for _, candidate in parsed]):
                queries = [parsed[positions[0]][0] for positions in window]
                where = [position for positions in window for position in positions]
                names = [f"Pair {positions[0]}" for positions in window] + [f"Pair {position}" for position in where]
                items = [*queries, *(parsed[position][1] for position in where)]
                seen = self._see(items, names, {}, known)
                for query, positions in zip(queries, window, strict=True):
                    items = [parsed[position][1] for position in positions]
                    scores_N[positions], more = self._scores(query, items, instruction, seen)
                    num_cut += more
                    progress.update(len(positions))
        self._say_cut(num_cut)
        return scores_N

    def _windows(self, groups: Sequence[list[int]], candidates: Sequence[Item]) -> Iterator[list[list[int]]]:
        """Runs of queries, each with the positions of its candidates, whose visual tokens fit into memory together."""
        bytes_per_token = self._backbone.width(self.model.config) * self.model.dtype.itemsize
        window: list[list[int]] = []
        num_bytes = 0
        for group in groups:
            tokens = sum(self._most_visual_tokens(candidates[n]) for n in group)
            more = tokens * bytes_per_token
            if window and (len(window) == QUERIES_PER_WINDOW or num_bytes + more > TOKEN_CACHE_BYTES):
                yield window
                window, num_bytes = [], 0
            window.append(group)
            num_bytes += more
        if window:
            yield window

    def _most_visual_tokens(self, item: Item) -> int:
        most = self.processor.most_visual_tokens(self.formatter.max_tiles(item), self.settings.max_pixels)
        return len(item.images) * most

    def rank(
        self,
        query: ItemLike,
        candidates: Sequence[ItemLike],
        *,
        top_k: int | None = None,
        instruction: str | None = None,
        visual_tokens: Sequence[StoredTokens] | None = None,
    ) -> list[dict[str, Any]]:
        """The candidates by falling :meth:`score`, as ``CrossEncoder.rank`` gives them; equal ones in the order given.

        ``corpus_id`` is the position among the candidates.  top_k: how many at most.
        """
        _check_top_k(top_k)
        scores_C = self.score(query, candidates, instruction=instruction, visual_tokens=visual_tokens)
        return _ranked(np.argsort(-scores_C, kind="stable")[:top_k], scores_C)

    def rank_listwise(
        self,
        query: ItemLike,
        candidates: Sequence[ItemLike],
        *,
        top_k: int | None = None,
        instruction: str | None = None,
        visual_tokens: Sequence[StoredTokens] | None = None,
    ) -> list[dict[str, Any]]:
        """The candidates as the model orders them when it sees several together and names the best by its number.

        Up to :data:`LIST_SIZE` candidates are one list, whose order is that of the probabilities of the numbers.  Of
        more, windows of so many are ordered from the last to the first, each half over the one before, so that the best
        come to the front however far behind they stood (arXiv:2304.09542); give the likeliest first.
        ``score`` is the probability in the last list that a candidate was in: comparable within a list only.
        Arguments and errors are as in :meth:`rank`.
        """
        _check_top_k(top_k)
        query, items, seen = self._seen(query, candidates, visual_tokens)
        order = list(range(len(items)))
        score_C = np.zeros(len(items), np.float32)
        start = max(0, len(order) - LIST_SIZE)
        most_cut = 0
        while order:
            window = order[start : start + LIST_SIZE]
            score_B, num_cut = self._list_scores(query, [items[n] for n in window], instruction, seen)
            most_cut = max(most_cut, num_cut)
            score_C[window] = score_B
            order[start : start + LIST_SIZE] = [window[n] for n in np.argsort(-score_B, kind="stable")]
            if start == 0:
                break
            start = max(0, start - LIST_SIZE // 2)
        self._say_cut(most_cut)
        return _ranked(np.array(order[:top_k], np.int64), score_C)

    def _seen(
        self, query: ItemLike, candidates: Sequence[ItemLike], stored: Sequence[StoredTokens] | None
    ) -> tuple[Item, list[Item], dict[Hashable, VisualTokens]]:
        """The query and the candidates as items, and the visual tokens of both."""
        items = [_parsed(one, f"Candidate {position}") for position, one in enumerate(as_list(candidates))]
        asked = _parsed(query, "The query")
        names = ["The query", *(f"Candidate {position}" for position in range(len(items)))]
        return asked, items, self._see([asked, *items], names, self._given(items, stored))

    def _given(self, items: Sequence[Item], stored: Sequence[StoredTokens] | None) -> dict[Hashable, VisualTokens]:
        """Visual tokens that were stored, as the model reads them, by :meth:`_pictures`."""
        if stored is None:
            return {}
        if len(stored) != len(items):
            raise InputError(f"Expected visual_tokens for {len(items)} candidates, got {len(stored)}.")
        given = {}
        for position, (item, tokens) in enumerate(zip(items, stored, strict=True)):
            if tokens is None:
                continue
            tokens = np.asarray(tokens)
            if len(item.images) != 1:
                raise InputError(
                    f"Candidate {position} has {len(item.images)} pictures: visual_tokens can be given for one picture."
                )
            tensor = torch.from_numpy(np.ascontiguousarray(tokens)).to(self.model.device, self.model.dtype)
            try:
                one, grid = self._backbone.restored(self.model.config, tensor)
            except ValueError as error:
                raise InputError(
                    f"Candidate {position}: visual_tokens {error}: were they made by another model?"
                ) from error
            given[self._pictures(item)] = VisualTokens(one, (grid,))
        return given

    def _see(
        self,
        items: Sequence[Item],
        names: Sequence[str],
        given: dict[Hashable, VisualTokens],
        known: LastUsed | None = None,
    ) -> dict[Hashable, VisualTokens]:
        """The visual tokens of every item with pictures, by :meth:`_pictures`; those given are not read.

        names: of the items, for messages.  known: what was seen before in this call.
        """
        found = dict(given)
        unseen: dict[Hashable, int] = {}
        for number, item in enumerate(items):
            key = self._pictures(item)
            if not item.images or key in found:
                continue
            if known is not None and key in known:
                found[key] = known[key]
            else:
                unseen.setdefault(key, number)
        rows = list(unseen.values())
        try:
            tokens_U = self.eyes.visual_tokens([items[row] for row in rows])
        except ImageError as error:
            place, _, reason = str(error).removeprefix("Item ").partition(": ")
            raise ImageError(f"{names[rows[int(place)]]}: {reason}") from error
        for key, one in zip(unseen, tokens_U, strict=True):
            found[key] = one
            if known is not None:
                known.put(key, one)
        return found

    def _pictures(self, item: Item) -> Hashable:
        return _key(Item(image=item.image, max_tiles=self.formatter.max_tiles(item)))

    @torch.inference_mode()
    def _scores(
        self,
        query: Item,
        items: Sequence[Item],
        instruction: str | None,
        seen: dict[Hashable, VisualTokens],
    ) -> tuple[npt.NDArray[np.float32], int]:
        """P(Yes) of each candidate, float32 [C], and how many texts were cut."""
        if not items:
            return np.empty(0, np.float32), 0
        prefix = self._read_query(query, instruction, seen, listwise=False)
        P = prefix.num_tokens
        tails, ids = self._fitting(self.formatter.tails(items), [[item] for item in items], P, seen)
        # the same candidate twice is read once
        keys = [(tail, self._pictures(item) if item.images else None) for tail, item in zip(tails, items, strict=True)]
        distinct = {key: n for n, key in reversed([*enumerate(keys)])}
        score: dict[Any, float] = {}
        rows = sorted(distinct.values(), key=lambda n: len(ids[n]))
        while rows:
            size = len(rows)
            while size > 1 and (P + len(ids[rows[size - 1]])) * size > self.tokens_per_batch:
                size -= 1
            batch, rows = rows[:size], rows[size:]
            words = [self.answers.yes, self.answers.no]
            logits_B2 = self._answer([ids[n] for n in batch], [items[n : n + 1] for n in batch], prefix, seen, words)
            for n, value in zip(batch, logits_B2.softmax(dim=1)[:, 0].tolist(), strict=True):
                score[keys[n]] = value
        scores_C = np.array([score[key] for key in keys], np.float32)
        return self._finite(scores_C), prefix.num_cut + sum(tail.num_cut for tail in tails)

    @torch.inference_mode()
    def _list_scores(
        self,
        query: Item,
        items: Sequence[Item],
        instruction: str | None,
        seen: dict[Hashable, VisualTokens],
    ) -> tuple[npt.NDArray[np.float32], int]:
        """The probabilities of the numbers of the candidates of a list, float32 [C], and how many texts were cut."""
        prefix = self._read_query(query, instruction, seen, listwise=True)
        (tail,), ids = self._fitting([self.formatter.list_tail(items)], [items], prefix.num_tokens, seen)
        logits_1C = self._answer(ids, [items], prefix, seen, list(self.answers.numbers[: len(items)]))
        return self._finite(logits_1C.softmax(dim=1)[0].cpu().numpy()), prefix.num_cut + tail.num_cut

    def _finite(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if not np.isfinite(scores).all():
            raise CheckpointError(f"{self.name} gives scores that are not numbers: its weights are damaged.")
        return scores

    def _read_query(
        self, query: Item, instruction: str | None, seen: dict[Hashable, VisualTokens], *, listwise: bool
    ) -> _Prefix:
        """The prefix of a query, read."""
        prefix = self.formatter.prefix(query, instruction, listwise=listwise)
        ids = self._expand(prefix, [query], seen)
        if len(ids) >= self.model.config.text_config.max_position_embeddings:
            raise InputError(
                f"The query takes {len(ids)} tokens, which leaves no room for a candidate: shorten it, or give its "
                "pictures fewer tiles."
            )
        # the template up to the query is the same for all queries
        opening = sum(len(run) for _, run in prefix.runs[: 1 + bool(self.settings.system_prompt.strip())])
        key = listwise, self.model.device, self.model.dtype, sum(weight._version for weight in self.model.parameters())
        if key not in self._openings:
            start: Any = DynamicCache(config=self.model.config.text_config)
            self._run([ids[:opening]], [[]], start, {}, 0)
            self._openings = {
                **{one: kept for one, kept in self._openings.items() if one[1:] == key[1:]},
                key: (opening, start),
            }
        opening, start = self._openings[key]
        cache = repeated(start, 1)
        self._run([ids[opening:]], [[query]], cache, seen, opening)
        following = int(self._positions(ids, [query], seen, 0).max()) + 1
        return _Prefix(len(ids), cache, prefix.num_cut, following)

    def _fitting(
        self,
        tails: list[TokenizedPrompt],
        items: Sequence[Sequence[Item]],
        prefix_tokens: int,
        seen: dict[Hashable, VisualTokens],
    ) -> tuple[list[TokenizedPrompt], list[list[int]]]:
        """The tails and their ids, of which those that no longer fit into the model have their texts cut at the end.

        items: the candidates of each.
        """
        room = self.model.config.text_config.max_position_embeddings - prefix_tokens
        ids = [self._expand(tail, some, seen) for tail, some in zip(tails, items, strict=True)]
        for n, one in enumerate(ids):
            if len(one) > room:
                tails[n] = _shortened(tails[n], len(one) - room)
                ids[n] = self._expand(tails[n], items[n], seen)
        return tails, ids

    @staticmethod
    def _say_cut(num_cut: int) -> None:
        if num_cut:
            _log.warning("%d texts were longer than the reranker reads, and were cut at their ends.", num_cut)

    def _expand(self, prompt: TokenizedPrompt, items: Sequence[Item], seen: dict[Hashable, VisualTokens]) -> list[int]:
        """The ids of a prompt, with as many slots for pictures as they have visual tokens."""
        return self.formatter.tokenize.expand(prompt, self._grids(items, seen))[0]

    def _grids(self, items: Sequence[Item], seen: dict[Hashable, VisualTokens]) -> list[Grid]:
        """How the pictures of some items were cut."""
        return [grid for item in items if item.images for grid in seen[self._pictures(item)].tiles]

    def _positions(
        self, ids: Sequence[int], items: Sequence[Item], seen: dict[Hashable, VisualTokens], start: int
    ) -> Tensor:
        """Positions of the tokens of a prompt or of a piece of one, int64 [axes, L]."""
        return self.processor.positions(ids, self._grids(items, seen), self.settings.positions, start)

    def _answer(
        self,
        ids: Sequence[Sequence[int]],
        items: Sequence[Sequence[Item]],
        prefix: _Prefix,
        seen: dict[Hashable, VisualTokens],
        answers: Sequence[int],
    ) -> Tensor:
        """The logits of some words as the answer to each row, float32 [B, words]."""
        hidden_BLD = self._run(ids, items, repeated(prefix.cache, len(ids)), seen, prefix.following)
        last_B = torch.tensor([len(row) - 1 for row in ids], device=hidden_BLD.device)
        hidden_BD = hidden_BLD[torch.arange(len(ids), device=hidden_BLD.device), last_B]
        head = self.model.lm_head
        # of the head's rows only those of the answers: a vocabulary of 151,000 would cost more than a layer
        return hidden_BD.float() @ head.weight[list(answers)].float().T

    def _run(
        self,
        ids: Sequence[Sequence[int]],
        items: Sequence[Sequence[Item]],
        cache: DynamicCache,
        seen: dict[Hashable, VisualTokens],
        start: int,
    ) -> Tensor:
        """Hidden states of rows that continue a cache, padded on the right, [B, L, D]; the cache takes them up.

        start: position of their first token.
        Nothing real comes after the padding, so under causal attention it needs no mask.
        """
        length = max(map(len, ids))
        input_ids = torch.full((len(ids), length), self.processor.tokenizer.pad_token_id)
        for row, one in enumerate(ids):
            input_ids[row, : len(one)] = torch.tensor(one)
        rest: dict[str, Any] = {}
        if self.processor.num_axes > 1:  # with one, positions are those of the cache and on
            positions = torch.zeros(self.processor.num_axes, *input_ids.shape, dtype=torch.int64)
            for row, (one, own) in enumerate(zip(ids, items, strict=True)):
                positions[:, row, : len(one)] = self._positions(one, own, seen, start)
            rest["position_ids"] = positions.to(self.model.device)
        input_ids = input_ids.to(self.model.device)
        embeds_BLD = self.model.get_input_embeddings()(input_ids)
        pictures = [seen[self._pictures(item)].tokens for row in items for item in row if item.images]
        if pictures:  # in order of rows
            embeds_BLD, more = self._backbone.place(self.model.model, input_ids, embeds_BLD, torch.cat(pictures))
            rest |= more
        hidden: Tensor = self.model.model.language_model(
            inputs_embeds=embeds_BLD, past_key_values=cache, use_cache=True, **rest
        ).last_hidden_state
        return hidden


class _Prefix(NamedTuple):
    """All up to the candidates, read.  cache: keys and values in all layers.  following: the next token's position."""

    num_tokens: int
    cache: DynamicCache
    num_cut: int
    following: int


def _parsed(value: ItemLike, name: str) -> Item:
    """The item, if it can be used; ``name`` begins the message if not."""
    try:
        item = Item.parse(value)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    if not item.images and not (item.text or "").strip():
        raise InputError(f"{name} has neither text nor image: give at least one.")
    return item


def _check_top_k(top_k: int | None) -> None:
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k}.")


def _ranked(order: npt.NDArray[np.integer], scores: npt.NDArray[np.float32]) -> list[dict[str, Any]]:
    return [{"corpus_id": int(n), "score": float(scores[n])} for n in order]


def _shortened(prompt: TokenizedPrompt, excess: int) -> TokenizedPrompt:
    """The prompt with so many tokens less: of its longest texts, from their ends."""
    lengths = {n: len(run) for n, (kind, run) in enumerate(prompt.runs) if kind == "text"}
    if sum(lengths.values()) < excess:
        raise InputError(
            "The query and the pictures leave no room for the candidates: shorten the query, or give fewer candidates."
        )
    for _ in range(excess):
        longest = max(lengths, key=lambda n: lengths[n])
        lengths[longest] -= 1
    runs = tuple((kind, run[: lengths[n]] if n in lengths else run) for n, (kind, run) in enumerate(prompt.runs))
    cut = sum(len(run) < len(whole) for (_, run), (_, whole) in zip(runs, prompt.runs, strict=True))
    return TokenizedPrompt(runs, max(prompt.num_cut, cut))


def _key(item: Item) -> Hashable:
    """What makes items the same: files by name; opened pictures and bytes if they are the same object."""
    named = [one if isinstance(one, (str, os.PathLike, ArchiveMember)) else id(one) for one in item.images]
    return item.text, tuple(named), item.instruction, item.max_tiles
