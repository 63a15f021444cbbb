"""Packs are full, pure functions of their number, and lose nobody without saying so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from quarterlight.data.conversations import Conversation, Message
from quarterlight.data.packing import WINDOW, PackedSampler, Sample, cut, fill, pack_all
from quarterlight.errors import DatasetError, InputError


class Numbers:
    """Conversations whose answers say how long they are to be."""

    def __init__(self, label: str, lengths: Sequence[int]) -> None:
        self.label = label
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Conversation:
        messages = (Message("user", "x"), Message("assistant", str(self.lengths[index])))
        return Conversation(id=f"{self.label}{index}", messages=messages)


def tokenize(conversation: Conversation) -> Sample:
    length = int(conversation.messages[-1].content)
    return Sample(id=conversation.id, ids=np.arange(length, dtype=np.int32), labelled=np.arange(length) >= length // 2)


def sampler(
    *sources: Numbers, max_tokens: int = 100, seed: int = 0, weights: Sequence[float] | None = None
) -> PackedSampler:
    return PackedSampler(sources, tokenize=tokenize, max_tokens=max_tokens, weights=weights, seed=seed)


def lengths(count: int, low: int, high: int) -> list[int]:
    return np.random.default_rng(count).integers(low, high, count).tolist()


def names(packs: PackedSampler, start: int, stop: int) -> list[list[str]]:
    return [[sample.id for sample in packs.pack(number)] for number in range(start, stop)]


def test_packs_are_full_and_none_overflows() -> None:
    packs = sampler(Numbers("a", lengths(5000, 3, 30)))
    found = [packs.pack(number) for number in range(4 * WINDOW)]
    totals = [sum(map(len, pack)) for pack in found]
    assert max(totals) <= 100
    assert sum(totals) == packs.counts.tokens > 0.9 * packs.counts.capacity == 0.9 * 4 * WINDOW * 100
    assert packs.counts.left_over <= 0.01 * packs.counts.drawn


def test_a_pack_follows_from_its_number_alone() -> None:
    sources = Numbers("a", lengths(300, 3, 30)), Numbers("b", lengths(500, 3, 60))
    forward = names(sampler(*sources), 0, 4 * WINDOW)
    other = sampler(*sources)
    for number in (100, 3, 99, 64, 31, 127, 0):
        assert [sample.id for sample in other.pack(number)] == forward[number]
    assert names(sampler(*sources, seed=1), 0, 4) != forward[:4]


def test_each_pass_draws_every_conversation_once_in_another_order() -> None:
    source = Numbers("a", [10] * 700)
    packs = sampler(source)
    passes = 3
    drawn = [name for pack in names(packs, 0, WINDOW * (passes * 700 // packs.draws + 2)) for name in pack]
    assert packs.counts.left_over == 0
    whole = Counter(drawn)
    assert min(whole[f"a{n}"] for n in range(700)) >= passes
    assert max(whole.values()) - min(whole.values()) <= 1
    assert packs.draws == 627  # of the 640 that fit, less two in a hundred


def test_weights_are_shares_of_conversations() -> None:
    packs = sampler(Numbers("a", [10] * 50), Numbers("b", [20] * 5000), weights=[3.0, 1.0])
    drawn = Counter(name[0] for pack in names(packs, 0, 10 * WINDOW) for name in pack)
    assert drawn["a"] / drawn.total() == pytest.approx(0.75, abs=0.01)
    natural = sampler(Numbers("a", [10] * 50), Numbers("b", [20] * 150))
    assert natural.shares.tolist() == [0.25, 0.75]


def test_long_ones_are_cut_or_dropped_and_counted() -> None:
    # half of each is the question: of 150 tokens, 25 of the answer fit; of 250, none does
    packs = sampler(Numbers("a", [20] * 98 + [150, 250]))
    while packs.counts.drawn < 2 * 100:
        packs.pack(packs.counts.drawn // packs.draws * WINDOW)
    assert packs.counts.cut >= 1 and packs.counts.dropped >= 1
    with pytest.raises(DatasetError, match="No conversation of b has an answer within its first 100 tokens"):
        sampler(Numbers("a", [20]), Numbers("b", [250]))


def test_what_finds_no_room_is_counted() -> None:
    packs = sampler(Numbers("a", [60] * 60 + [10] * 40))  # two of the long ones share no pack
    drawn = [name for pack in names(packs, 0, 20 * WINDOW) for name in pack]
    assert len(drawn) + packs.counts.left_over == packs.counts.drawn
    assert packs.counts.left_over < 0.05 * packs.counts.drawn


def test_cut_ends_with_an_answer_and_keeps_whole_pictures() -> None:
    labelled = np.array([0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1], dtype=np.bool_)
    sample = Sample(
        id="x", ids=np.arange(12, dtype=np.int32), labelled=labelled, images=("p", "q"), tiles=(1, 2), image_ends=(2, 9)
    )
    assert cut(sample, 12) is sample
    shorter = cut(sample, 11)
    assert shorter is not None and (len(shorter), shorter.images) == (11, ("p", "q"))
    first = cut(sample, 10)
    assert first is not None
    assert (first.ids.tolist(), first.images, first.tiles, first.image_ends) == (list(range(6)), ("p",), (1,), (2,))
    assert cut(sample, 4) is None


def test_fill_balances_and_leaves_what_does_not_fit() -> None:
    packs, left = fill([5, 1, 4, 3, 9, 2], num_packs=2, max_tokens=10)
    assert packs == [[4, 1], [0, 2]]
    assert left == [3, 5]


def test_pack_all_keeps_everyone() -> None:
    samples = [tokenize(Numbers("a", [length])[0]) for length in (60, 50, 40, 30, 20)]
    packs = pack_all(samples, 100)
    assert [[len(sample) for sample in pack] for pack in packs] == [[60, 40], [50, 30, 20]]


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("inf")]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(InputError, match="2 sources need as many positive weights"):
        sampler(Numbers("a", [10]), Numbers("b", [10]), weights=weights)
