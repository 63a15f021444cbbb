from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from quarterlight.errors import InputError
from quarterlight.models.embedder import Embedder
from quarterlight.models.readable import encode_readable
from quarterlight.records import Item


def test_bad_pictures_are_named_and_the_others_embedded(tiny_embedder: Embedder, picture, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    good = [Item(text="a"), Item(image=picture(0)), Item(text="b")]
    bad = [Item(image=tmp_path / "gone.png"), Item(text="c", image=tmp_path / "torn.png")]
    items = [good[0], bad[0], good[1], bad[1], good[2]]
    vectors, problems = encode_readable(tiny_embedder.encode_document, items)
    assert vectors == pytest.approx(tiny_embedder.encode_document(good), abs=1e-5)
    assert list(problems) == [1, 3]
    assert "gone.png" in problems[1] and "torn.png" in problems[3]
    vectors, problems = encode_readable(tiny_embedder.encode_document, bad)
    assert len(vectors) == 0 and list(problems) == [0, 1]


def test_other_mistakes_are_raised(tiny_embedder: Embedder) -> None:
    with pytest.raises(InputError, match="Item 1 has neither text nor image"):
        encode_readable(tiny_embedder.encode_document, [Item(text="a"), Item(text=" ")])


def test_rows_that_are_not_numbers_are_left_out() -> None:
    def encode(items: Sequence[Item]) -> np.ndarray:
        return np.array([[float(str(item.text)), 1.0] for item in items], np.float32)

    vectors, problems = encode_readable(encode, [Item(text=text) for text in ("1", "nan", "2", "inf")])
    assert vectors.tolist() == [[1.0, 1.0], [2.0, 1.0]]
    assert list(problems) == [1, 3]
