"""A judge of any family reads pairs alone as it reads them in a batch, and sees their pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.models.qwen import QWEN, plain_qwen

from quarterlight.mining.judges import Pair
from quarterlight.mining.judges.local import TransformersJudge
from quarterlight.models.tokenizer import train_tokenizer
from quarterlight.records import Candidate, Item, Query


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["yes no Yes No YES NO, determine whether it is relevant"] * 4, 400)


@pytest.mark.parametrize("family", QWEN)
def test_batches_change_nothing(
    family: str, tmp_path: Path, tokenizer: Any, picture: Callable[..., Image.Image]
) -> None:
    judge = TransformersJudge(plain_qwen(family, tmp_path, tokenizer), device="cpu", dtype=torch.float32)
    query = Query(qid="q", item=Item(text="a red apple", image=picture(0, 40, 20)), positives=())
    shown = [Item(text="a pear"), Item(image=picture(1, 24, 64)), Item(image=picture(2, 24, 64)), Item(text="apple")]
    pairs = [
        Pair(task="x/it2i", query=query, candidate=Candidate(did=str(n), item=one), instruction="Find it.")
        for n, one in enumerate(shown)
    ]
    together = [verdict for group in judge.judge(pairs) for verdict in group]
    alone = [verdict for pair in pairs for group in judge.judge([pair]) for verdict in group]
    assert [one.did for one in together] == ["0", "1", "2", "3"]
    assert not any(one.failed for one in together)
    for one, other in zip(together, alone, strict=True):
        assert (one.yes, one.no) == pytest.approx((other.yes, other.no), abs=1e-4)
    assert abs(together[1].yes - together[2].yes) > 1e-3  # another picture
