"""What the model reads: the paper's templates as segments, and the instructions of its Tables 11 and 12.

A prompt is one user turn in ChatML, followed by the opening of the assistant's turn, whose last token is pooled:

    <|im_start|>user
    Instruct: {instruction} <image> Query: {text}<|im_end|>
    <|im_start|>assistant

(Magic-MM-Embedding, section 3.1; a candidate has ``Text:`` in place of ``Query:``.)  A part that is missing takes its
label and its blank with it.  Segments are cut before blanks, where byte-level pre-tokenisers cut too, so that
tokenising one segment after the other gives the tokens of the whole string, and every token is known to belong to the
frame, the instruction, a picture or the text.  :func:`chat_template` says the same in Jinja, for programs that know
nothing of this package.

U-MARVEL (arXiv:2507.14902) writes queries and candidates alike, without labels, and pools what comes after its question
too (:attr:`PromptStyle.U_MARVEL`):

    <|im_start|>user
    <image><instruction_start>{instruction}<instruction_end> {text}<|im_end|>
    <|im_start|>assistant
    <emb>.<|im_end|>

Its two markers say where an instruction begins and ends to a program that sees nothing but token ids; words that others
wrote cannot spell them.  The paper's own template has them too where the mean over all other tokens is the embedding.

A reranker reads a query and one candidate, or several, in one such turn (section 3.4): :class:`RerankPrompt` and
:func:`rerank_chat_template`.  The paper's line breaks before ``Query:`` and ``Candidate:`` are blanks here, since a
byte-level tokeniser joins a line break to the mark before it, and the tokens of a query would depend on what follows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

from quarterlight.errors import InputError, did_you_mean

Role: TypeAlias = Literal["query", "document"]
"""Which side of a search an item stands on; a candidate is a document, as sentence-transformers calls it."""

LABELS: Mapping[Role, str] = MappingProxyType({"query": "Query:", "document": "Text:"})
"""What precedes the text of an item."""


class PromptStyle(StrEnum):
    """Whose template an embedder reads."""

    MAGIC = "magic"
    """Magic-MM-Embedding's: labels before instruction and text, and the assistant's turn left open"""
    U_MARVEL = "u_marvel"
    """U-MARVEL's, without the request for one word that its authors found to do harm: no labels, sentences that begin
    with a capital and end with a full stop, ``<emb>.`` as the answer; candidates never have an instruction"""


EMB = "<emb>"
INSTRUCTION_START = "<instruction_start>"
INSTRUCTION_END = "<instruction_end>"
MARKERS = (EMB, INSTRUCTION_START, INSTRUCTION_END)
"""Special tokens that U-MARVEL adds to a tokenizer, in the order of their ids."""

QUERY_INSTRUCTIONS: Mapping[str, str] = MappingProxyType(
    {
        "t2t": "Retrieve relevant texts based on a given query.",
        "t2i": "Retrieve relevant images based on a given query.",
        "t2it": "Find a related image and text content from Wikipedia that answers the given query.",
        "t2vd": "Retrieve relevant visual documents based on a given query.",
        "i2t": "Find an image caption describing the given image.",
        "i2i": "Find a image that looks similar to the provided image.",  # "a image": as printed in the paper
        "it2t": "Represent the given image with the given query and retrieve the answer.",
        "it2i": "Represent the given image with the given query and retrieve the related images.",
        "it2it": "Retrieve a Wikipedia image-description pair that provides evidence for the given query.",
    }
)
"""Direction (t text, i image, it both, vd visual document) -> instruction of the query."""

TARGET_INSTRUCTIONS: Mapping[str, str] = MappingProxyType(
    {
        "text": "Represent the given text.",
        "image": "Represent the given image.",
        "image,text": "Represent the given image with related text information.",
        "page": "Represent the given visual documents.",
    }
)
"""Modality of a candidate, or ``page`` -> its instruction."""

UNKNOWN_TARGET: Mapping[str, str] = MappingProxyType({"text": "t2i", "image": "i2i", "image,text": "it2i"})
"""Modality of a query -> direction assumed when nobody says what is searched for: pictures."""


def query_instruction(direction: str | None, modality: str = "text") -> str:
    """The instruction of a query: by its direction, or by its modality when the direction is ``None``.

    Raises InputError for an unknown direction.

    >>> query_instruction(None, "image") == query_instruction("i2i")
    True
    """
    direction = UNKNOWN_TARGET[modality] if direction is None else direction
    if direction not in QUERY_INSTRUCTIONS:
        raise InputError(f"There is no direction {direction!r}. {did_you_mean(direction, QUERY_INSTRUCTIONS)}")
    return QUERY_INSTRUCTIONS[direction]


def target_instruction(modality: str, page: bool = False) -> str:
    """The instruction of a candidate; ``page`` marks a picture of a document page, table or chart."""
    return TARGET_INSTRUCTIONS["page" if page and modality == "image" else modality]


POINTWISE = (
    "I will provide you with a query and a candidate. Please evaluate whether the candidate meets the requirements of "
    "the query. If it does, respond with 'Yes'; if it doesn't, respond with 'No'."
)
"""What a reranker is asked about a query and a candidate (Magic-MM-Embedding, section 3.4)."""

LISTWISE = (
    "I will provide you with a query followed by multiple candidates in the format: (1) cand1 (2) cand2, etc. Each "
    "candidate is independent of the others. Evaluate each candidate against the query, and respond with the number "
    "corresponding to the candidate that best meets the requirements of the query."
)
"""What it is asked about a query and several candidates, likewise."""


class Segment(NamedTuple):
    """A run of a prompt. ``text`` is empty for an image, which a backbone spells with its own tokens. The label of the
    instruction counts as instruction, that of the text as frame. A marker is a special token at either end of the
    instruction, and belongs to it."""

    kind: Literal["frame", "instruction", "image", "text", "marker"]
    text: str


def as_sentence(text: str, *, first: bool = True) -> str:
    """The text without surrounding blanks and double quotes, with a capital in front and a full stop at its end.

    U-MARVEL's treatment of texts and instructions; a text that ends with ``?`` or ``!`` keeps that, an empty one stays
    empty.  first: ``False`` leaves the beginning as it is, of a text that comes after an instruction.
    A carriage return disappears with the line break that follows it, and is a blank alone: what stood on either side
    must not become one word, or a text could spell a special token that nobody saw in it.

    >>> as_sentence(' "a red apple" ')
    'A red apple.'
    """
    text = text.replace("\r\n", "\n").replace("\r", " ").strip()
    text = text.strip('"').strip() if first else text.rstrip('"').rstrip()
    if first:
        text = text[:1].upper() + text[1:]
    return text + "." * (bool(text) and text[-1] not in ".?!")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One item as it is put to the model, surrounding blanks removed.

    system: an optional system turn before the user's; the ``-hf`` checkpoints of InternVL3 have none, Qwen2-VL's say
        ``You are a helpful assistant.``
    style: whose template.  In U-MARVEL's a candidate loses its instruction, and words are put into sentences.
    marked: whether the instruction, its label included, stands between markers; in U-MARVEL's style it always does.
    """

    role: Role
    instruction: str = ""
    num_images: int = 0
    text: str = ""
    system: str = ""
    style: PromptStyle = PromptStyle.MAGIC
    marked: bool = False

    def __post_init__(self) -> None:
        parts = {part: getattr(self, part).strip() for part in ("instruction", "text", "system")}
        if self.style is PromptStyle.U_MARVEL:
            parts["instruction"] = as_sentence(parts["instruction"]) if self.role == "query" else ""
            parts["text"] = as_sentence(parts["text"], first=not parts["instruction"])
            object.__setattr__(self, "marked", True)
        for part, value in parts.items():
            object.__setattr__(self, part, value)

    def segments(self) -> tuple[Segment, ...]:
        """The prompt from first to last token; only instruction and text hold words that others wrote."""
        system = [Segment("frame", f"<|im_start|>system\n{self.system}<|im_end|>\n")] if self.system else []
        opening = Segment("frame", "<|im_start|>user\n")
        closing = "<|im_end|>\n<|im_start|>assistant\n"
        if self.style is PromptStyle.U_MARVEL:
            return (*system, opening, *self._unlabelled(), Segment("frame", f"{closing}{EMB}.<|im_end|>\n"))
        return (*system, opening, *self._labelled(), Segment("frame", closing))

    def _labelled(self) -> list[Segment]:
        """The user's turn in the style of Magic-MM-Embedding."""
        parts: list[Segment] = []
        if self.instruction:
            said = [Segment("instruction", "Instruct:"), Segment("instruction", f" {self.instruction}")]
            parts += self._between_markers(said) if self.marked else said
        for _ in range(self.num_images):
            parts += [Segment("frame", " ")] * bool(parts) + [Segment("image", "")]
        if self.text:
            parts += [Segment("frame", " " * bool(parts) + LABELS[self.role]), Segment("text", f" {self.text}")]
        return parts

    def _unlabelled(self) -> list[Segment]:
        """The same in the style of U-MARVEL."""
        parts = [Segment("image", "")] * self.num_images
        if not self.instruction:
            return parts + [Segment("text", self.text)] * bool(self.text)
        parts += self._between_markers([Segment("instruction", self.instruction)])
        # The full stop belongs to instruction and text together, so one without text has it behind its marker.
        return [*parts, Segment("text", f" {self.text}") if self.text else Segment("frame", ".")]

    @staticmethod
    def _between_markers(said: list[Segment]) -> list[Segment]:
        return [Segment("marker", INSTRUCTION_START), *said, Segment("marker", INSTRUCTION_END)]

    def render(self, image: str = "<image>") -> str:
        """The prompt as one string, each picture written as ``image``.

        >>> Prompt(role="query", instruction="Find it.", num_images=1, text="a cat").render().splitlines()[1]
        'Instruct: Find it. <image> Query: a cat<|im_end|>'
        """
        return "".join(image if segment.kind == "image" else segment.text for segment in self.segments())


@dataclass(frozen=True, kw_only=True)
class RerankPart:
    """A query, or a candidate, of a :class:`RerankPrompt`; surrounding blanks are removed.

    instruction: what the query looks for; candidates have none.
    """

    instruction: str = ""
    num_images: int = 0
    text: str = ""

    def __post_init__(self) -> None:
        for part in ("instruction", "text"):
            object.__setattr__(self, part, getattr(self, part).strip())

    def segments(self) -> tuple[Segment, ...]:
        """Instruction, pictures and text, each with the blank before it."""
        parts = [Segment("instruction", f" {self.instruction}")] * bool(self.instruction)
        for _ in range(self.num_images):
            parts += [Segment("frame", " "), Segment("image", "")]
        return (*parts, *[Segment("text", f" {self.text}")] * bool(self.text))


@dataclass(frozen=True, kw_only=True)
class RerankPrompt:
    """A query with one candidate, to be answered Yes or No, or with several, to be answered by the number of the best.

        <|im_start|>user
        I will provide you with a query and a candidate. ... Query: {query} Candidate: {candidate}<|im_end|>
        <|im_start|>assistant

    (Magic-MM-Embedding, section 3.4.)  The prompt is a prefix that depends on the query alone, then the candidates,
    then a closing that is always the same, so that one query's prefix serves all of its candidates.

    listwise: the template of several candidates, which are numbered from 1.
    """

    query: RerankPart
    candidates: tuple[RerankPart, ...]
    listwise: bool = False
    system: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "system", self.system.strip())

    def prefix(self) -> tuple[Segment, ...]:
        """All up to the candidates."""
        system = [Segment("frame", f"<|im_start|>system\n{self.system}<|im_end|>\n")] if self.system else []
        asked = LISTWISE if self.listwise else POINTWISE
        opening = Segment("frame", f"<|im_start|>user\n{asked} Query:")
        label = Segment("frame", " Candidates:" if self.listwise else " Candidate:")
        return (*system, opening, *self.query.segments(), label)

    def tail(self) -> tuple[Segment, ...]:
        """The candidates and the closing."""
        parts: list[Segment] = []
        for number, candidate in enumerate(self.candidates, start=1):
            parts += [Segment("frame", f" ({number})")] * self.listwise + [*candidate.segments()]
        return (*parts, Segment("frame", "<|im_end|>\n<|im_start|>assistant\n"))

    def render(self, image: str = "<image>") -> str:
        """The prompt as one string, each picture written as ``image``."""
        return "".join(image if segment.kind == "image" else segment.text for segment in (*self.prefix(), *self.tail()))


def chat_template(
    *,
    image: str,
    defaults: Mapping[Role, Mapping[str, str]],
    system: str = "",
    style: PromptStyle = PromptStyle.MAGIC,
    marked: bool = False,
) -> str:
    """A Jinja chat template that renders what :meth:`Prompt.render` does.

    One user message is one item.  The role is the template variable ``task`` (``encode_query`` and ``encode_document``
    of sentence-transformers set it), or the prefix ``query:`` / ``document:`` of a system message; a bare item is a
    document.  The rest of the system message is the instruction; without one, it follows from role and modality.
    image: how a picture is spelt.  defaults: role -> modality -> instruction.
    system, style, marked: as in :class:`Prompt`.
    """
    source = _READING + (_UNLABELLED if style is PromptStyle.U_MARVEL else _LABELLED)
    said = f"'{INSTRUCTION_START}Instruct: ' ~ instruction ~ '{INSTRUCTION_END}'" if marked else _INSTRUCT
    source = source.replace("@INSTRUCTION@", said)
    for name, value in {
        "DEFAULTS": {role: dict(instructions) for role, instructions in defaults.items()},
        "LABELS": dict(LABELS),
        "SYSTEM": f"<|im_start|>system\n{system.strip()}<|im_end|>\n" if system.strip() else "",
        "IMAGE": image,
    }.items():
        source = source.replace(f"@{name}@", json.dumps(value, ensure_ascii=False))
    return source.strip()


def rerank_chat_template(*, image: str, instructions: Mapping[str, str], system: str = "") -> str:
    """A Jinja chat template that renders what :meth:`RerankPrompt.render` does with one candidate.

    The messages are those of sentence-transformers' ``CrossEncoder``: one of the role ``query`` and one of the role
    ``document``; a system message is the instruction of the query, which otherwise follows from its modality.
    image, system: as in :func:`chat_template`.  instructions: modality of a query -> its instruction.
    """
    source = _RERANK_TEMPLATE
    for name, value in {
        "INSTRUCTIONS": dict(instructions),
        "OPENING": (f"<|im_start|>system\n{system.strip()}<|im_end|>\n" if system.strip() else "")
        + f"<|im_start|>user\n{POINTWISE} Query:",
        "IMAGE": image,
    }.items():
        source = source.replace(f"@{name}@", json.dumps(value, ensure_ascii=False))
    return source.strip()


_RERANK_TEMPLATE = r"""
{%- set ns = namespace(images=0, text='', instruction='', query='', candidate='') -%}
{%- for message in messages -%}
{%- set ns.images = 0 -%}
{%- set ns.text = '' -%}
{%- if message.content is string -%}
{%- set blocks = [{'type': 'text', 'text': message.content}] -%}
{%- else -%}
{%- set blocks = message.content -%}
{%- endif -%}
{%- for block in blocks -%}
{%- if block.type == 'image' -%}
{%- set ns.images = ns.images + 1 -%}
{%- elif block.type == 'text' -%}
{%- set ns.text = (ns.text ~ ' ' ~ block.text) | trim -%}
{%- endif -%}
{%- endfor -%}
{%- set shown = (' ' ~ @IMAGE@) * ns.images ~ ((' ' ~ ns.text) if ns.text else '') -%}
{%- if message.role == 'system' -%}
{%- set ns.instruction = ns.text -%}
{%- elif message.role == 'query' -%}
{%- set modality = 'text' if not ns.images else ('image,text' if ns.text else 'image') -%}
{%- set ns.query = ' ' ~ (ns.instruction or @INSTRUCTIONS@[modality]) ~ shown -%}
{%- else -%}
{%- set ns.candidate = shown -%}
{%- endif -%}
{%- endfor -%}
{{- @OPENING@ ~ ns.query ~ ' Candidate:' ~ ns.candidate ~ '<|im_end|>\n<|im_start|>assistant\n' -}}
"""

_READING = r"""
{%- set ns = namespace(role='query' if task == 'query' else 'document', instruction='', images=0, text='') -%}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set blocks = [{'type': 'text', 'text': message.content}] -%}
{%- else -%}
{%- set blocks = message.content -%}
{%- endif -%}
{%- for block in blocks -%}
{%- if block.type == 'image' -%}
{%- set ns.images = ns.images + 1 -%}
{%- elif block.type == 'text' and message.role == 'system' -%}
{%- set ns.instruction = block.text | trim -%}
{%- elif block.type == 'text' -%}
{%- set ns.text = (ns.text ~ ' ' ~ block.text) | trim -%}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- for role in ['query', 'document'] -%}
{%- if ns.instruction.startswith(role ~ ':') -%}
{%- set ns.role = role -%}
{%- set ns.instruction = ns.instruction[(role | length) + 1:] | trim -%}
{%- endif -%}
{%- endfor -%}
{%- set modality = 'text' if not ns.images else ('image,text' if ns.text else 'image') -%}
"""

_INSTRUCT = "'Instruct: ' ~ instruction"

_LABELLED = r"""{%- set instruction = ns.instruction or @DEFAULTS@[ns.role][modality] -%}
{{- @SYSTEM@ ~ '<|im_start|>user\n' ~ @INSTRUCTION@ -}}
{%- for _ in range(ns.images) -%}
{{- ' ' ~ @IMAGE@ -}}
{%- endfor -%}
{%- if ns.text -%}
{{- ' ' ~ @LABELS@[ns.role] ~ ' ' ~ ns.text -}}
{%- endif -%}
{{- '<|im_end|>\n<|im_start|>assistant\n' -}}
"""

# The macros are as_sentence: whole, and what both of its uses end with.
_UNLABELLED = r"""
{%- macro ended(words) -%}
{{- words ~ ('.' if words and words[-1] not in ['.', '?', '!'] else '') -}}
{%- endmacro -%}
{%- macro plain(words) -%}
{{- words.replace('\r\n', '\n').replace('\r', ' ').strip() -}}
{%- endmacro -%}
{%- macro sentence(words) -%}
{%- set bare = plain(words).strip('"').strip() -%}
{{- ended(bare[:1].upper() ~ bare[1:]) -}}
{%- endmacro -%}
{%- set instruction = sentence(ns.instruction or @DEFAULTS@['query'][modality]) if ns.role == 'query' else '' -%}
{{- @SYSTEM@ ~ '<|im_start|>user\n' ~ @IMAGE@ * ns.images -}}
{%- if instruction -%}
{%- set text = ended(plain(ns.text).rstrip('"').rstrip()) -%}
{{- '<instruction_start>' ~ instruction ~ '<instruction_end>' ~ ((' ' ~ text) if text else '.') -}}
{%- else -%}
{{- sentence(ns.text) -}}
{%- endif -%}
{{- '<|im_end|>\n<|im_start|>assistant\n<emb>.<|im_end|>\n' -}}
"""
