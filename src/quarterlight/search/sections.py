"""Texts cut into pieces that each say one thing: by heading, then by paragraph."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

MAX_CHARS = 1500
"""Length of the longest section; about 400 tokens of English."""

_HEADING = re.compile(r"(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*$")
_FENCE = re.compile(r"\s{0,3}(```|~~~)")


class Section(NamedTuple):
    """title: the headings above, outermost first, joined by `` > ``; empty where there are none."""

    title: str
    text: str


def markdown_sections(text: str, *, max_chars: int = MAX_CHARS) -> list[Section]:
    """The text under each ``#`` heading, cut further where it is longer than ``max_chars``.

    A heading with nothing under it lives on in the titles below it; if there is no text at all, headings are the text.

    >>> markdown_sections("# Fruit\\n## Apples\\nThey are red.")
    [Section(title='Fruit > Apples', text='They are red.')]
    """
    headings: list[tuple[int, str]] = []
    bodies: list[tuple[str, list[str]]] = [("", [])]
    fence = ""
    for line in text.splitlines():
        mark = _FENCE.match(line)
        if mark and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
        heading = None if fence else _HEADING.match(line)
        if heading is None:
            bodies[-1][1].append(line)
            continue
        level = len(heading[1])
        headings = [(other, words) for other, words in headings if other < level] + [(level, heading[2])]
        bodies.append((" > ".join(words for _, words in headings), []))
    sections = [Section(title, block) for title, lines in bodies for block in _blocks("\n".join(lines), max_chars)]
    return sections or [Section("", block) for block in _blocks(text, max_chars)]


def plain_sections(text: str, *, max_chars: int = MAX_CHARS) -> list[Section]:
    """The paragraphs of a text, as many together as ``max_chars`` allows."""
    return [Section("", block) for block in _blocks(text, max_chars)]


def _blocks(text: str, max_chars: int) -> Iterator[str]:
    block = ""
    for paragraph in re.split(r"\n\s*\n", text):
        for piece in _pieces(paragraph.strip(), max_chars):
            if block and len(block) + 2 + len(piece) > max_chars:
                yield block
                block = ""
            block = f"{block}\n\n{piece}" if block else piece
    if block:
        yield block


def _pieces(paragraph: str, max_chars: int) -> Iterator[str]:
    """A paragraph cut at the last blank that fits; in the middle of a word only where there is none."""
    start = 0
    while len(paragraph) - start > max_chars:
        end = start + max_chars
        blank = max(paragraph.rfind(" ", start + 1, end + 1), paragraph.rfind("\n", start + 1, end + 1))
        cut = blank if blank > 0 else end
        yield paragraph[start:cut].strip()
        start = cut
    if paragraph:
        yield paragraph[start:].strip()
