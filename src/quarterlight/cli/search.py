"""``quarterlight search``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from quarterlight.cli import console
from quarterlight.cli.index import DEFAULT_STORE
from quarterlight.cli.models import FusionOption, K, QuantizationOption, RerankerOption, check_rerank, open_pair
from quarterlight.cli.page import check_page, write_page
from quarterlight.errors import InputError
from quarterlight.images import describe, load_image
from quarterlight.index import IndexStore, Kind
from quarterlight.index.store import models_in
from quarterlight.metrics.fusion import RERANK
from quarterlight.records import Item
from quarterlight.search.encoder import identity_of
from quarterlight.search.retrieve import Hit, Searcher, snippet
from quarterlight.search.walk import READERS

LEAST_PATH = 30
"""Columns that the name of a file may take in a terminal of whatever width."""

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def search(
    text: Annotated[str, typer.Argument(help="What to look for, in words.")] = "",
    image: Annotated[
        str | None, typer.Option(metavar="FILE", help="A picture to look for; with words: what to change in it.")
    ] = None,
    type: Annotated[Kind | None, typer.Option(help="Only pictures, only PDF pages or only texts.")] = None,
    within: Annotated[Path | None, typer.Option("--in", help="Only this file, or files in this folder.")] = None,
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="How many results.")] = 10,
    store: Annotated[Path, typer.Option(help="Folder of the index.", show_default="./.quarterlight")] = DEFAULT_STORE,
    model: Annotated[str, typer.Option(help="The model that the index was made with.")] = "nano",
    rerank: Annotated[
        int,
        typer.Option(
            min=0, max=1000, metavar=K, help=f"Give so many of the first results to a reranker ({RERANK} without K)."
        ),
    ] = 0,
    reranker: RerankerOption = None,
    fusion: FusionOption = None,
    quantization: QuantizationOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one line of JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write the results as a page for the browser.")] = None,
) -> None:
    """Find pictures, PDF pages and texts of an index with words, with a picture, or with both.

    \b
    quarterlight search "woman astronaut"
    quarterlight search --image apple.jpg --type image --top-k 20
    quarterlight search "dark skin tone" --image runner.webp --html found.html
    quarterlight search "training loss" --type page --in ~/papers --rerank 20
    """
    if image is None and not text.strip():
        raise typer.BadParameter("Nothing to look for: give words, --image FILE, or both.")
    check_rerank(rerank, reranker, fusion)
    _check_picture(image)
    if html is not None:
        check_page(html)
    _check_store(store, within)
    if image is None:
        _hint(text.strip())
    query = Item(text=text.strip() or None, image=Path(image) if image else None)
    from quarterlight.models.embedder import Embedder

    if rerank:
        embedder, judge = open_pair(model, reranker, quantization=quantization)
    else:
        embedder, judge = Embedder(model, quantization=quantization), None
    table = IndexStore.open(store, identity_of(embedder))
    searcher = Searcher(table, embedder, reranker=judge, rerank=rerank, fusion_weight=fusion)
    hits = searcher.search(query, kind=type, within=within, top_k=top_k)
    for problem in searcher.problems:
        console.err.print(str(problem), style="yellow", markup=False, soft_wrap=True)
    if as_json:
        console.print_json({"query": {"text": query.text, "image": image}, "hits": [_record(hit) for hit in hits]})
    elif hits:
        console.out.print(_table(hits, reranked=bool(rerank)))
    else:
        console.err.print("Nothing was found.")
    if html is not None:
        write_page(html, [(query, hits)], title=f"Quarterlight: {describe(store)}")
        console.err.print(f"Wrote {describe(html)}.", markup=False, soft_wrap=True)


def _check_picture(image: str | None) -> None:
    """Raises InputError for a picture that is not to be had, before a model is loaded."""
    if image is not None and _ADDRESS.match(image):
        raise InputError(f"{image} is an address, and pictures are read from files: download it and name the file.")
    if image is not None:
        load_image(Path(image))


def _check_store(store: Path, within: Path | None) -> None:
    """Raises StoreError where there is no index, and InputError when it has nothing of the place to look in."""
    models = models_in(store)
    if within is not None and not any(IndexStore.open(store, model).count(within=within) for model in models):
        raise InputError(
            f"The index in {describe(store)} has nothing of {describe(within)}: --in takes a file that is indexed, or "
            "a folder of such files."
        )


def _hint(text: str) -> None:
    """Says so when words look like the name of a picture."""
    is_picture = os.path.isfile(text) and READERS.get(Path(text).suffix.lower()) == "image"  # noqa: PTH113 long text
    if is_picture or _ADDRESS.match(text):
        wanted = "--image and its name" if is_picture else "--image and the name of a file"
        console.err.print(
            f"{describe(text)} is taken as words; to look for a picture, give {wanted}.", markup=False, soft_wrap=True
        )


def _record(hit: Hit) -> dict[str, Any]:
    names = ("score", "rerank_score", "kind", "page", "section", "title", "snippet", "width", "height", "uri")
    return {"path": str(hit.path)} | {name: getattr(hit, name) for name in names}


def _table(hits: list[Hit], *, reranked: bool) -> Table:
    scores = ("score", "reranked")[: 1 + reranked]
    table = console.table("#", *scores, "kind", "path", "part", "text", right=("#", *scores))
    table.columns[2 + len(scores)].no_wrap = True  # it is shortened instead
    most = max(LEAST_PATH, console.out.width // 2)
    for rank, hit in enumerate(hits, start=1):
        words = snippet(f"{hit.title}: {hit.snippet}" if hit.title else hit.snippet, "", max_chars=100)
        judged = [console.score(hit.rerank_score)] * reranked
        cells = (rank, f"{hit.score:.3f}", *judged, hit.kind, _short(hit.path, most), _part(hit), words)
        table.add_row(*(Text(str(cell)) for cell in cells))  # Text, since a file may be called "[red]"
    return table


def _part(hit: Hit) -> str:
    """Which page of a PDF, or section of a text."""
    return f"p. {hit.page}" if hit.page else f"§ {hit.section}" if hit.section else ""


def _short(path: Path, most: int) -> str:
    """The name of a file as seen from here; one wider than ``most`` columns loses its beginning, a folder at a time.

    >>> _short(Path("/photos/2024/summer/beach.jpg"), 20)
    '…/summer/beach.jpg'
    """
    here = Path.cwd()
    name = describe(path.relative_to(here) if path.is_relative_to(here) else path)
    if cell_len(name) <= most:
        return name
    while cell_len(name) > most - 1:
        name = name[1:]
    return "…" + name[max(0, name.find("/")) :]
