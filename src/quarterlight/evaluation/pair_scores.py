"""What a reranker says of pairs, each asked for once, and kept on disk as embeddings are.

N pairs.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from quarterlight.errors import DatasetError
from quarterlight.files import replacing
from quarterlight.records import Item

BLOCK = 2048
"""Pairs put to the reranker and written at once: so many are lost at most when a process is killed."""

Pair: TypeAlias = "tuple[Item, Item]"


class PairScores:
    """P(Yes) of pairs of a query and a candidate; pairs that are the same have the same score to the last bit.

    predict: scores pairs, float32 [N].
    folder: where scores outlive the run, a file for each block; ``None`` keeps them for as long as this object lives.
    key: with a folder, what a score depends on of an item: 16 bytes.
    """

    def __init__(
        self,
        predict: Callable[[Sequence[Pair]], npt.NDArray[np.float32]],
        *,
        folder: Path | None = None,
        key: Callable[[Item], bytes] | None = None,
    ) -> None:
        if (folder is None) != (key is None):
            raise ValueError("a folder needs keys, and keys a folder")
        self.folder = folder
        self._predict = predict
        self._key = key
        self._score: dict[Hashable, float] = {}
        self._files: set[Path] = set()

    def find(self) -> None:
        """Learns of the blocks that have come since the last time, of this process and of others."""
        for file in sorted(self.folder.glob("*.npz")) if self.folder is not None else ():
            if file not in self._files:
                keys, score_N = _read(file)
                self._score.update(zip(keys, score_N.tolist(), strict=True))
                self._files.add(file)

    def of(self, pairs: Sequence[Pair]) -> tuple[npt.NDArray[np.float32], int]:
        """The scores of N pairs, float32 [N], and how many distinct ones the reranker had to be asked for."""
        keys = [self._name(pair) for pair in pairs]
        todo = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._score}
        missing = list(todo)
        for start in range(0, len(missing), BLOCK):
            block = missing[start : start + BLOCK]
            score_N = np.asarray(self._predict([todo[key] for key in block]), np.float32)
            if self.folder is not None:
                self._write(self.folder, block, score_N)
            self._score.update(zip(block, score_N.tolist(), strict=True))
        return np.array([self._score[key] for key in keys], np.float32), len(missing)

    def _name(self, pair: Pair) -> Hashable:
        return pair if self._key is None else _digest(*map(self._key, pair))

    def _write(self, folder: Path, keys: list[Hashable], score_N: npt.NDArray[np.float32]) -> None:
        names = [bytes(key) for key in keys]  # type: ignore[call-overload]  # what _name makes with a folder
        file = folder / f"{_digest(*names).hex()}.npz"
        with replacing(file) as draft, draft.open("wb") as stream:
            np.savez(stream, key=np.array(names, dtype="V16"), score=score_N)
        self._files.add(file)


def _read(file: Path) -> tuple[list[bytes], npt.NDArray[np.float32]]:
    """The keys and scores of a block."""
    try:
        with file.open("rb") as stream, np.load(stream) as block:
            return [bytes(key) for key in block["key"].tolist()], block["score"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{file} is damaged ({error}): remove it, and its pairs are scored again.") from error


def _digest(*parts: bytes) -> bytes:
    """16 bytes that differ when the parts do, which are of one length."""
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()
