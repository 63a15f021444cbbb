"""A page of results that a browser opens: one HTML file with everything in it.

Names and texts come from other people's files, so every one of them is escaped, and a content policy forbids scripts
and anything from elsewhere.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TypeAlias

from quarterlight.files import replace_file
from quarterlight.images import describe, load_image
from quarterlight.records import Item, ItemLike
from quarterlight.search.documents import thumbnail
from quarterlight.search.retrieve import Hit

Hits: TypeAlias = "Sequence[Hit] | Mapping[str, Sequence[Hit]]"
"""What one query found; or several orders of it, by name, which are shown beside each other."""

_STYLE = """
:root { color-scheme: light dark; --ground: #f6f5f2; --card: #fff; --ink: #1d1d1b; --soft: #6d6b66; --line: #e3e1db;
  --accent: #b4530a; }
@media (prefers-color-scheme: dark) { :root { --ground: #161614; --card: #201f1d; --ink: #eceae4; --soft: #9d9a92;
  --line: #34322e; --accent: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 88rem; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { margin: 0 0 2rem; font-size: 1rem; font-weight: 600; letter-spacing: .02em; color: var(--soft); }
section { margin: 0 0 3.5rem; }
.query { display: flex; align-items: center; gap: 1rem; margin: 0 0 1.25rem; padding-bottom: 1.25rem;
  border-bottom: 1px solid var(--line); }
.query img { width: 5.5rem; height: 5.5rem; object-fit: contain; background: #fff; border-radius: 8px;
  border: 1px solid var(--line); }
.query h2 { margin: 0; font-size: clamp(1.3rem, 3vw, 1.9rem); font-weight: 650; line-height: 1.2;
  overflow-wrap: anywhere; }
.query p { margin: .2rem 0 0; color: var(--soft); }
ol { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(13rem, 100%), 1fr)); gap: 1rem; margin: 0;
  padding: 0; list-style: none; }
li { display: flex; flex-direction: column; overflow: hidden; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
a { color: inherit; text-decoration: none; }
li a:hover strong { text-decoration: underline; }
a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.picture { display: block; height: 13rem; background: var(--ground); border-bottom: 1px solid var(--line); }
.picture img { display: block; width: 100%; height: 100%; object-fit: contain; }
.page img { object-fit: cover; object-position: top; }
.words { padding: 1rem; overflow: hidden; overflow-wrap: anywhere; background: none; color: var(--ink);
  font: 1rem/1.5 Georgia, serif; }
.words span { display: -webkit-box; overflow: hidden; -webkit-box-orient: vertical; -webkit-line-clamp: 7; }
.label { display: block; padding: .7rem .85rem .8rem; }
.label strong { display: block; font-weight: 600; overflow-wrap: anywhere; }
.label small { display: block; color: var(--soft); overflow-wrap: anywhere; }
.score { float: right; margin-left: .5rem; color: var(--accent); font-variant-numeric: tabular-nums; }
.bar { height: 3px; margin-top: auto; background: var(--accent); }
.score small { text-align: right; }
.orders { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr)); gap: 2rem; }
.orders h3 { margin: 0 0 .75rem; font-size: 1rem; font-weight: 600; }
.none { color: var(--soft); }
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_contact_sheet(
    path: str | os.PathLike[str],
    results: Sequence[tuple[ItemLike, Hits]],
    *,
    title: str = "Quarterlight",
) -> None:
    """Write queries and their hits as one self-contained HTML file.

    Hits that were reranked show that score, with the cosine below.
    Raises ImageError when a query's picture cannot be read, OSError when the file cannot be written.
    """
    sections = "\n".join(_section(Item.parse(query), hits) for query, hits in results)
    html = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{_text(title)}</h1>
{sections}
</body>
</html>
"""
    replace_file(Path(path), html, parents=False)


def _section(query: Item, hits: Hits) -> str:
    pictures = "".join(_image(thumbnail(load_image(source)), "query picture") for source in query.images)
    words = _text((query.text or "").strip()) or "Like this picture"
    if isinstance(hits, Mapping):
        number = max(map(len, hits.values()), default=0)
        lists = (f"<div><h3>{_text(name)}</h3>\n{_list(order)}</div>" for name, order in hits.items())
        body = f'<div class="orders">{"".join(lists)}</div>'
    else:
        number, body = len(hits), _list(hits)
    count = f"{number} {'result' if number == 1 else 'results'}"
    return f"""<section>
<div class="query">{pictures}<div><h2>{words}</h2><p>{count}</p></div></div>
{body}
</section>"""


def _list(hits: Sequence[Hit]) -> str:
    best = max((hit.score for hit in hits), default=1.0)
    cards = "\n".join(_card(rank, hit, best) for rank, hit in enumerate(hits, start=1))
    return f"<ol>\n{cards}\n</ol>" if hits else '<p class="none">Nothing was found.</p>'


def _card(rank: int, hit: Hit, best: float) -> str:
    """A card links to its file; ``#page=`` is understood by browsers' PDF viewers."""
    link = escape(hit.uri + (f"#page={hit.page}" if hit.page else ""), quote=True)
    name = describe(hit.path.name)
    if hit.thumbnail:
        picture = f'<span class="picture {hit.kind}">{_image(hit.thumbnail, name)}</span>'
    else:
        picture = f'<span class="picture words"><span>{_text(hit.snippet)}</span></span>'
    part = f"page {hit.page}" if hit.page else f"section {hit.section}" if hit.section else ""
    place = f"{hit.width} × {hit.height}" if hit.kind == "image" else part
    details = " · ".join(_text(part) for part in (f"#{rank}", hit.title, place) if part)
    if hit.rerank_score is not None:
        width = 100 * hit.rerank_score
        score = f"{hit.rerank_score:.3f}<small>cosine {hit.score:.3f}</small>"
    else:
        width = 100 * max(0.0, min(1.0, hit.score / best)) if best > 0 else 0
        score = f"{hit.score:.3f}"
    return f"""<li><a href="{link}" title="{_text(describe(hit.path))}">{picture}
<span class="label"><span class="score">{score}</span><strong>{_text(name)}</strong>
<small>{details}</small></span></a><div class="bar" style="width:{width:.0f}%"></div></li>"""


def _image(webp: bytes, alt: str) -> str:
    return f'<img src="data:image/webp;base64,{base64.b64encode(webp).decode()}" alt="{_text(alt)}">'


def _text(text: str) -> str:
    """Text as it may stand between tags and in quoted attributes; what UTF-8 cannot hold is written out."""
    return escape(text.encode("utf-8", errors="backslashreplace").decode(), quote=True)
