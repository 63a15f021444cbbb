"""Samples of many lengths packed into rows of one length, drawn from a mixture of sources.

The draw is a pure function of sources, weights, seed and the number of a pack, so that a run that stops resumes at any
pack, and every process of a run can take its own packs without reading those of the others.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np
import numpy.typing as npt

from quarterlight.data.conversations import Conversation, Conversations
from quarterlight.data.schedule import Passes
from quarterlight.errors import DatasetError, InputError
from quarterlight.records import ImageSource

WINDOW = 64
"""Packs that are filled together: enough that lengths even out, few enough that a process which needs one of them does
not read much that others train on."""

_MEASURED = 1024  # conversations of a source whose lengths decide how many fill a window
_MARGIN = 0.02  # by which the mean length of so many may miss that of all
_TRIALS = 8


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A conversation as tokens.

    ids: int32 [L].  labelled: bool [L], which of them the model is to write.
    images: its pictures.  tiles: of each, their number or their rows and columns.
    image_ends: for each, the place after its last token.
    """

    id: str
    ids: npt.NDArray[np.int32]
    labelled: npt.NDArray[np.bool_]
    images: tuple[ImageSource, ...] = ()
    tiles: tuple[int | tuple[int, int], ...] = ()
    image_ends: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_tiles(self) -> int:
        """Of all pictures."""
        return sum(one if isinstance(one, int) else one[0] * one[1] for one in self.tiles)


Tokenize = Callable[[Conversation], Sample]
"""What turns a conversation into tokens; pictures are counted in tiles, not decoded."""


def cut(sample: Sample, max_tokens: int) -> Sample | None:
    """The sample up to the last token of an answer among its first ``max_tokens``; ``None`` if there is none."""
    if len(sample) <= max_tokens:
        return sample
    written = np.flatnonzero(sample.labelled[:max_tokens])
    if not len(written):
        return None
    end = int(written[-1]) + 1
    whole = sum(stop <= end for stop in sample.image_ends)
    return replace(
        sample,
        ids=sample.ids[:end],
        labelled=sample.labelled[:end],
        images=sample.images[:whole],
        tiles=sample.tiles[:whole],
        image_ends=sample.image_ends[:whole],
    )


def fill(lengths: Sequence[int], num_packs: int, max_tokens: int) -> tuple[list[list[int]], list[int]]:
    """The places of the lengths in each pack, and of those that no pack has room for.

    The longest goes first, each into the pack with the most room, so that all packs cost about the same.
    """
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    room = [(-max_tokens, number) for number in range(num_packs)]
    left: list[int] = []
    for place in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        free, number = room[0]
        if lengths[place] > -free:
            left.append(place)
            continue
        packs[number].append(place)
        heapq.heapreplace(room, (free + lengths[place], number))
    return packs, left


def pack_all(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """All samples in few packs: the longest first, each into the first pack that has room.  None is over-long."""
    packs: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=len, reverse=True):
        number = next((n for n, free in enumerate(room) if len(sample) <= free), len(packs))
        if number == len(packs):
            packs.append([])
            room.append(max_tokens)
        packs[number].append(sample)
        room[number] -= len(sample)
    return packs


@dataclass(kw_only=True)
class PackingCounts:
    """What became of the conversations that were drawn."""

    drawn: int = 0
    """conversations, repetitions included"""
    cut: int = 0
    """longer than a pack, of which the beginning is kept"""
    dropped: int = 0
    """longer than a pack, without an answer in its beginning"""
    left_over: int = 0
    """without room in their window; another pass over the source draws them into another one"""
    tokens: int = 0
    """in packs"""
    capacity: int = 0
    """tokens that the packs could hold"""


class PackedSampler:
    """The packs of a training run by number.

    weights: one positive number a source, in proportion to its share of the conversations; ``None`` gives every
        conversation the same chance.
    tokenize: makes samples.  max_tokens: the most tokens of a pack.  seed: decides the order.

    Packs are filled ``WINDOW`` at a time with a number of conversations that a trial on some of them found to fit, so
    that the conversations of a window follow from its number alone.  Those that find no room after all are counted.
    Raises DatasetError when no conversation of a source fits into a pack.
    """

    def __init__(
        self,
        sources: Sequence[Conversations],
        *,
        tokenize: Tokenize,
        max_tokens: int,
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        if not sources:
            raise InputError("Packing needs at least one source of conversations.")
        if max_tokens < 1 or seed < 0:
            raise InputError(f"max_tokens must be at least 1 and the seed not negative, got {max_tokens} and {seed}.")
        if weights is not None and (
            len(weights) != len(sources) or not all(0 < weight < math.inf for weight in weights)
        ):
            raise InputError(f"{len(sources)} sources need as many positive weights, got {weights}.")
        shares = np.array(weights or [len(source) for source in sources], dtype=np.float64)
        self.shares = shares / shares.sum()
        self.max_tokens = max_tokens
        self.seed = seed
        self.counts = PackingCounts()
        self._tokenize = tokenize
        self._sources = [(one, Passes(len(one), (seed, number))) for number, one in enumerate(sources)]
        self._offsets = np.random.default_rng(seed).random(len(sources))
        self._windows: dict[int, list[list[Sample]]] = {}
        self._lock = Lock()
        self.draws = self._fitting(self._measure())
        """conversations of a window"""

    @property
    def conversations_per_pack(self) -> float:
        """How many conversations a pack has on average."""
        return self.draws / WINDOW

    def pack(self, number: int) -> list[Sample]:
        """The samples of a pack, counted from 0; empty where conversations nearly as long as a pack leave one over."""
        window, place = divmod(number, WINDOW)
        with self._lock:
            if window not in self._windows:
                self._windows = {one: packs for one, packs in self._windows.items() if one >= window - 1}
                self._windows[window] = self._pack_window(window)
            return self._windows[window][place]

    def _pack_window(self, window: int) -> list[list[Sample]]:
        first, last = self._drawn_before(window), self._drawn_before(window + 1)
        samples = []
        for (conversations, passes), start, stop in zip(self._sources, first, last, strict=True):
            for turn in range(int(start), int(stop)):
                sample = self._sample(conversations[passes.place(turn)])
                self.counts.drawn += 1
                if sample is not None:
                    samples.append(sample)
        packs, left = fill([len(sample) for sample in samples], WINDOW, self.max_tokens)
        self.counts.left_over += len(left)
        self.counts.tokens += sum(map(len, samples)) - sum(len(samples[place]) for place in left)
        self.counts.capacity += WINDOW * self.max_tokens
        # in another order, or the longest samples would always be in the first packs
        order = np.random.default_rng((self.seed, len(self._sources), window)).permutation(WINDOW)
        return [[samples[place] for place in packs[number]] for number in order]

    def _drawn_before(self, window: int) -> npt.NDArray[np.int64]:
        """How many conversations the windows before this one draw from each source."""
        return np.floor(window * self.draws * self.shares + self._offsets).astype(np.int64)

    def _sample(self, conversation: Conversation) -> Sample | None:
        sample = self._tokenize(conversation)
        short = cut(sample, self.max_tokens)
        if short is None:
            self.counts.dropped += 1
        elif short is not sample:
            self.counts.cut += 1
        return short

    def _measure(self) -> list[npt.NDArray[np.int64]]:
        """Lengths of some conversations of each source; 0 for those that do not fit."""
        lengths = []
        for conversations, _ in self._sources:
            count = len(conversations)
            places = np.linspace(0, count - 1, min(_MEASURED, count)).astype(int)
            samples = [self._sample(conversations[int(place)]) for place in places]
            found = np.array([0 if sample is None else len(sample) for sample in samples])
            if not found.any():
                raise DatasetError(
                    f"No conversation of {conversations.label} has an answer within its first {self.max_tokens} "
                    "tokens: raise max_tokens."
                )
            lengths.append(found)
        self.counts = PackingCounts()
        return lengths

    def _fitting(self, lengths: Sequence[npt.NDArray[np.int64]]) -> int:
        """The most draws of which none was left over in any trial, less a margin."""

        def fits(draws: int) -> bool:
            for trial in range(_TRIALS):
                generator = np.random.default_rng((self.seed, trial))
                counts = generator.multinomial(draws, self.shares)
                drawn = np.concatenate([generator.choice(one, n) for one, n in zip(lengths, counts, strict=True)])
                if fill(drawn.tolist(), WINDOW, self.max_tokens)[1]:
                    return False
            return True

        mean = float(sum(share * one.mean() for share, one in zip(self.shares, lengths, strict=True)))
        low, high = 1, max(2, math.ceil(WINDOW * self.max_tokens / mean) + 1)  # the first fits, the last does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return max(1, math.floor((1 - _MARGIN) * low))
