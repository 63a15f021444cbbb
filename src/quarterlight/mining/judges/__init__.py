"""Judges: whoever says whether a candidate is relevant to a query. One protocol, one file for each kind of judge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from quarterlight.images import load_image
from quarterlight.records import Candidate, ImageSource, Query

QUESTION = (
    "Please make your judgment. If relevant, output 'yes'. If irrelevant, output 'no'. You are only allowed to output "
    "'yes' or 'no'. Please output strictly according to the requirements."
)
"""How the template of Magic-MM-Embedding, section 3.3, ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A query and one of the candidates that were retrieved for it. task: ``dataset/task``."""

    task: str
    query: Query
    candidate: Candidate
    instruction: str
    """the judgment instruction"""

    def prompt(self) -> list[tuple[str, ImageSource | None]]:
        """The template of section 3.3 as runs of words, each followed by a picture or, the last one, by ``None``.

            {judgment instruction}
            Query: {query}
            Target: {target}
            Please make your judgment. ...

        An item's pictures stand before its words, as in the prompts of the embedder.
        """
        runs: list[tuple[str, ImageSource | None]] = []
        words = self.instruction
        for label, item in (("Query:", self.query.item), ("Target:", self.candidate.item)):
            words += f"\n{label}"
            for picture in item.images:
                runs.append((f"{words} ", picture))
                words = ""
            if text := (item.text or "").strip():
                words += f" {text}"
        return [*runs, (f"{words}\n{QUESTION}", None)]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge said of a pair; relevant is what has ``yes > no``, irrelevant ``no > yes``, undecided neither.

    qid, did: of the pair.  yes, no: logits of the likeliest spelling of either word; 1 and -1 where the judge
        knows words only.  judge: who said it.  failed: why there is no answer, in place of one; empty if there is.
    """

    qid: str
    did: str
    yes: float = 0.0
    no: float = 0.0
    judge: str = ""
    failed: str = ""

    @property
    def relevant(self) -> bool | None:
        """``None`` when undecided."""
        return None if self.yes == self.no else self.yes > self.no


class Judge(Protocol):
    """Answers pairs as they come, in any order."""

    @property
    def name(self) -> str:
        """Who it is, as written beside each of its verdicts."""

    def judge(self, pairs: Iterable[Pair]) -> Iterator[Sequence[Verdict]]:
        """Verdicts on all pairs, in whatever groups they become known.

        Pairs are taken as they are needed.  A pair that cannot be judged gets a verdict with ``failed``; JudgeError is
        raised when none can be.
        """


def spelling(token: str) -> str | None:
    """``yes`` or ``no`` if the token is a way to write it: in any case, with the mark or blank of a new word before it.

    >>> spelling(" Yes"), spelling("NO"), spelling("yesterday")
    ('yes', 'no', None)
    """
    word = token.strip(" \n\tĠ▁").lower()
    return word if word in ("yes", "no") else None


def shown(source: ImageSource, max_pixels: int) -> Image.Image:
    """The picture as judges see it: scaled down, if need be, to at most ``max_pixels``. Raises ImageError."""
    picture = load_image(source)
    scale = (max_pixels / (picture.width * picture.height)) ** 0.5
    if scale >= 1:
        return picture
    return picture.resize((max(1, int(picture.width * scale)), max(1, int(picture.height * scale))))
