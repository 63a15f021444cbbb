"""Queries and candidates to the tokens that a reranker reads, the same way for training and for use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quarterlight.errors import CheckpointError, InputError
from quarterlight.models.inputs import SegmentTokenizer, TokenizedPrompt, check_instruction, frame_ids
from quarterlight.models.processor import VTCProcessor
from quarterlight.models.settings import RerankerSettings
from quarterlight.prompts import RerankPart, RerankPrompt
from quarterlight.records import Item

MAX_LIST = 9
"""Candidates of a list: the number of the best is one digit, which is one token."""


@dataclass(frozen=True)
class AnswerTokens:
    """The ids of what a reranker answers: yes, no, and the numbers from 1."""

    yes: int
    no: int
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, where: object) -> AnswerTokens:
        """Found in the tokenizer.

        where: for the message.  Raises CheckpointError when it spells one of the answers in several tokens.
        """
        words = ["Yes", "No", *map(str, range(1, MAX_LIST + 1))]
        found = []
        for word in words:
            ids = frame_ids(tokenizer, word)
            if len(ids) != 1:
                raise CheckpointError(
                    f"The tokenizer of {where} spells {word!r} in {len(ids)} tokens: a reranker answers with one, so "
                    "this model cannot be one."
                )
            found.append(ids[0])
        return cls(found[0], found[1], tuple(found[2:]))


class RerankFormatter:
    """Writes queries and candidates as a reranker was taught to read them (Magic-MM-Embedding, section 3.4).

    A prompt is a prefix, which depends on the query alone, and a tail with one candidate or several;
    ``TokenizedPrompt(prefix.runs + tail.runs)`` is the whole.
    """

    def __init__(self, processor: VTCProcessor, settings: RerankerSettings) -> None:
        self.processor = processor
        self.settings = settings
        self.tokenize = SegmentTokenizer(processor, settings.text_max_tokens)

    def prefix(self, query: Item, instruction: str | None = None, *, listwise: bool = False) -> TokenizedPrompt:
        """All up to the candidates.

        instruction: of a query without one of its own; ``None`` takes the checkpoint's default for its modality.
        Raises InputError for a query without text and image.
        """
        prompt = RerankPrompt(
            query=self.query(query, instruction), candidates=(), listwise=listwise, system=self.settings.system_prompt
        )
        return self.tokenize([prompt.prefix()])[0]

    def tails(self, candidates: Sequence[Item]) -> list[TokenizedPrompt]:
        """What follows the prefix, for each candidate alone.

        Raises InputError for a candidate without text and image.
        """
        parts = self._candidates(candidates)
        return self.tokenize([RerankPrompt(query=RerankPart(), candidates=(one,)).tail() for one in parts])

    def list_tail(self, candidates: Sequence[Item]) -> TokenizedPrompt:
        """What follows the prefix, for all candidates together, numbered from 1; :data:`MAX_LIST` of them at most.

        Raises InputError as :meth:`tails` does, and for too many candidates.
        """
        if len(candidates) > MAX_LIST:
            raise InputError(f"A list has at most {MAX_LIST} candidates, got {len(candidates)}.")
        parts = tuple(self._candidates(candidates))
        return self.tokenize([RerankPrompt(query=RerankPart(), candidates=parts, listwise=True).tail()])[0]

    def query(self, item: Item, instruction: str | None = None) -> RerankPart:
        """The query as a part of the prompt. Raises InputError for one without text and image."""
        if not item.images and not (item.text or "").strip():
            raise InputError("The query has neither text nor image: give at least one.")
        if item.instruction is not None:
            instruction = item.instruction
        check_instruction(instruction)
        if instruction is None:
            instruction = self.settings.instructions[item.modality]
        return RerankPart(instruction=instruction, num_images=len(item.images), text=item.text or "")

    def max_tiles(self, item: Item) -> int:
        """The most tiles of each of an item's pictures."""
        return item.max_tiles or self.settings.max_tiles

    def _candidates(self, items: Sequence[Item]) -> list[RerankPart]:
        parts = []
        for number, item in enumerate(items):
            if not item.images and not (item.text or "").strip():
                raise InputError(f"Candidate {number} has neither text nor image: give at least one.")
            parts.append(RerankPart(num_images=len(item.images), text=item.text or ""))
        return parts
