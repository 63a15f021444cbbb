"""``quarterlight demo``: the main job on real files, from folders to a page of results."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quarterlight.cli import console
from quarterlight.cli.page import check_page, write_page
from quarterlight.errors import InputError
from quarterlight.images import describe
from quarterlight.records import Item

if TYPE_CHECKING:
    from quarterlight.index import Kind
    from quarterlight.search.contact_sheet import Hits
    from quarterlight.search.retrieve import Hit, Searcher

CHECKOUT = Path(__file__).resolve().parents[3]
"""Where the repository is, if the package runs from one; the example files are there."""

TOP_K = 5

RERANK = 10
"""Results that the reranker sees, where the model has one: more than are shown, so that it can bring some forward."""


EMBEDDER, RERANKED = "Embedder", "Embedder and reranker"
"""What the two orders are called."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One search of the demo.

    image: a picture below the examples, itself left out of the results.  kind: what is searched for.
    answer: a file that belongs among the results, below the examples; the tests look for it.
    """

    text: str | None = None
    image: str | None = None
    kind: Kind = "image"
    answer: str

    @property
    def title(self) -> str:
        """What is asked, in one line."""
        return " + ".join(part for part in (self.image, f'"{self.text}"' if self.text else None) if part)


QUESTIONS: dict[str, tuple[Question, ...]] = {
    "Words to pictures": (
        Question(text="woman astronaut", answer="emoji/noto/woman-astronaut.webp"),
        Question(text="snow-capped mountain", answer="emoji/noto/snow-capped-mountain.webp"),
        Question(text="flag: Finland", answer="emoji/twemoji/flag-finland.webp"),
        Question(text="battery charging", answer="icons/battery-charging-50.png"),
    ),
    "A picture to pictures": (
        Question(image="emoji/noto/woman-firefighter.webp", answer="emoji/twemoji/woman-firefighter.webp"),
        Question(image="emoji/twemoji/man-red-hair.webp", answer="emoji/noto/man-red-hair.webp"),
    ),
    "A picture and words to pictures": (
        Question(
            image="emoji/twemoji/woman-running.webp",
            text="dark skin tone",
            answer="emoji/twemoji/woman-running-dark-skin-tone.webp",
        ),
        Question(
            image="emoji/noto/woman-construction-worker.webp",
            text="dark skin tone",
            answer="emoji/noto/woman-construction-worker-dark-skin-tone.webp",
        ),
    ),
    "Words to pages": (
        Question(
            text="Dust Aerosol Detection, Monitoring and Forecasting",
            kind="page",
            answer="pages/dust-aerosol-detection.pdf",
        ),
    ),
}
"""What is asked, by kind of search.  nano knows these words and has not seen the pictures that answer them."""


def demo(
    out: Annotated[Path, typer.Option(help="The page of results to write.")] = Path("demo.html"),
    examples: Annotated[
        Path, typer.Option(help="Folder of the example files.", show_default="examples/ of the repository")
    ] = CHECKOUT / "examples",
    store: Annotated[Path, typer.Option(help="Folder of the index.")] = Path(".quarterlight-demo"),
    model: Annotated[str, typer.Option(help="A bundled name, a checkpoint folder or a hub id.")] = "nano",
) -> None:
    """Index the example files, search them in four ways, and write a page of results.

    The four ways: words to pictures, a picture to pictures, a picture and words to pictures, words to pages.
    With a model that has a reranker, both orders are shown: that of the embedder, and that after reranking.

    \b
    quarterlight demo --out demo.html
    """
    examples = examples.resolve()  # as its files are called in the index
    questions = [question for group in QUESTIONS.values() for question in group]
    if not all((examples / question.image).is_file() for question in questions if question.image):
        raise InputError(
            f"There are no example files in {describe(examples)}: they come with the repository. "
            "Name their folder with --examples, or index files of your own with quarterlight index."
        )
    check_page(out)
    from quarterlight.index import IndexStore
    from quarterlight.models.embedder import Embedder
    from quarterlight.models.pair import load_pair
    from quarterlight.models.reranker import has_reranker
    from quarterlight.search.encoder import identity_of
    from quarterlight.search.ingest import ingest
    from quarterlight.search.retrieve import Searcher

    embedder, reranker = load_pair(model) if has_reranker(model) else (Embedder(model), None)
    table = IndexStore.create(store, identity_of(embedder))
    with console.progress("files") as bar:
        line = bar.add_task(f"Indexing {examples.name}", total=None)
        report = ingest(
            [examples],
            table,
            embedder,
            visual_tokens="float16" if reranker else None,
            on_progress=lambda done, total: bar.update(line, completed=done, total=total),
        )
    for problem in report.problems:
        console.err.print(str(problem), style="yellow", markup=False, soft_wrap=True)
    console.err.print(f"{report.num_rows:,} pictures, pages and sections are indexed ({report.seconds:.1f} s).\n")

    searcher = Searcher(table, embedder, reranker=reranker)
    results: list[tuple[Item, Hits]] = []
    for heading, group in QUESTIONS.items():
        console.out.print(heading, style="bold underline")
        if model == "nano" and group[0].kind == "page":
            console.out.print("nano cannot read: what it finds here is little better than chance.")
        for question in group:
            query, hits = ask(searcher, question, examples)
            if reranker is None:
                results.append((query, hits))
                _print(question, hits, examples)
            else:
                orders = {EMBEDDER: hits, RERANKED: ask(searcher, question, examples, rerank=RERANK)[1]}
                results.append((query, orders))
                _print_orders(question, orders, examples)
    write_page(out, results, title=f"Quarterlight: {report.num_rows:,} example pictures, pages and texts")
    own = f'{console.program()} search "soccer ball" --store {shlex.quote(str(store))}'
    if model != "nano":
        own += f" --model {shlex.quote(model)}"
    console.err.print(f"Wrote {out}: open it in a browser.\nAsk your own: {own}", markup=False, soft_wrap=True)


def ask(searcher: Searcher, question: Question, examples: Path, *, rerank: int = 0) -> tuple[Item, list[Hit]]:
    """The question as the model gets it, and what was found; a query's own picture is no answer.

    rerank: how many results the searcher's reranker sees.
    """
    picture = examples / question.image if question.image else None
    query = Item(text=question.text, image=picture)
    hits = searcher.search(query, kind=question.kind, within=examples, top_k=TOP_K + 1, rerank=rerank)
    return query, [hit for hit in hits if picture is None or hit.path != picture][:TOP_K]


def _print(question: Question, hits: list[Hit], examples: Path) -> None:
    paged = ("page",) if question.kind == "page" else ()
    table = console.table("", "score", "file", *paged, title=question.title, right=("", "score", "page"))
    for rank, hit in enumerate(hits, start=1):
        table.add_row(f"{rank}", console.score(hit.score), _name(hit, examples), *[f"{hit.page}" for _ in paged])
    console.out.print(table)
    console.out.print()


def _print_orders(question: Question, orders: Mapping[str, list[Hit]], examples: Path) -> None:
    """Both orders beside each other; a page's number stands behind its file."""
    table = console.table("", "score", EMBEDDER, "score", RERANKED, title=question.title, right=("", "score"))
    for rank, (found, reranked) in enumerate(zip(orders[EMBEDDER], orders[RERANKED], strict=True), start=1):
        cells = [
            (console.score(score), _name(hit, examples) + (f" p. {hit.page}" if hit.page else ""))
            for score, hit in ((found.score, found), (reranked.rerank_score, reranked))
        ]
        table.add_row(f"{rank}", *cells[0], *cells[1])
    console.out.print(table)
    console.out.print()


def _name(hit: Hit, examples: Path) -> str:
    return (hit.path.relative_to(examples) if hit.path.is_relative_to(examples) else hit.path).as_posix()
