"""A page of headings, paragraphs, tables and figures, as Markdown and as one HTML file that needs no other."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em; color: #222; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid #888; }
td.right, th.right { text-align: right; }
tr.ours td { font-weight: 600; background: #eef6ff; }
figure { margin: 1.5em 0; } figcaption { color: #555; }
svg { max-width: 100%; height: auto; }
"""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Points:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Table:
    """columns, rows: texts.  left: how many columns hold words; the others hold numbers.  ours: rows to set apart."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    ours: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Plot:
    """name: of its file, without the ending."""

    name: str
    caption: str
    svg: str


Block = Heading | Paragraph | Points | Table | Plot


def svg(figure: Figure) -> str:
    """The picture as SVG, the same for the same figure."""
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.hashsalt": "quarterlight", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def to_markdown(blocks: Sequence[Block], *, plots: str = "plots") -> str:
    """The page as Markdown; its plots are the files ``<plots>/<name>.svg`` beside it."""
    return "\n\n".join(_markdown(block, plots) for block in blocks) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML file."""
    body = "\n".join(map(_html, blocks))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _markdown(block: Block, plots: str) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Paragraph():
            return block.text
        case Points():
            return "\n".join(f"- {item}" for item in block.items)
        case Plot():
            return f"![{block.caption}]({plots}/{block.name}.svg)"
        case Table():
            rule = ["---" if number < block.left else "---:" for number in range(len(block.columns))]
            rows = [
                [f"**{cell}**" if cell and number in block.ours else cell for cell in row]
                for number, row in enumerate(block.rows)
            ]
            return "\n".join(f"| {' | '.join(_cell(one) for one in row)} |" for row in (block.columns, rule, *rows))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
        case Paragraph():
            return f"<p>{html.escape(block.text)}</p>"
        case Points():
            return "<ul>\n" + "\n".join(f"<li>{html.escape(item)}</li>" for item in block.items) + "\n</ul>"
        case Plot():
            return f"<figure>\n{block.svg}\n<figcaption>{html.escape(block.caption)}</figcaption>\n</figure>"
        case Table():

            def row(cells: Sequence[str], tag: str, number: int | None) -> str:
                classes = ['class="right"' if place >= block.left else "" for place in range(len(cells))]
                inner = "".join(
                    f"<{tag} {one}>{html.escape(cell)}</{tag}>".replace(" >", ">")
                    for cell, one in zip(cells, classes, strict=True)
                )
                return f'<tr class="ours">{inner}</tr>' if number in block.ours else f"<tr>{inner}</tr>"

            head = row(block.columns, "th", None)
            body = "\n".join(row(cells, "td", number) for number, cells in enumerate(block.rows))
            return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
