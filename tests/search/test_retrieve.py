"""Searching: what is found, how it is told, and how it is shown."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.search.fakes import FakeEncoder
from tests.search.files import pdf, write_image

from quarterlight.errors import ImageError, InputError
from quarterlight.index import IndexStore
from quarterlight.prompts import QUERY_INSTRUCTIONS
from quarterlight.records import Item
from quarterlight.search.contact_sheet import write_contact_sheet
from quarterlight.search.encoder import identity_of
from quarterlight.search.ingest import ingest
from quarterlight.search.retrieve import Searcher, instruction_of, snippet

HOSTILE = "\"><script>alert(1)<\\script>&'\n.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for colour in ("red", "green", "blue"):
        write_image(folder / "pictures" / f"{colour}.png", colour)
    write_image(folder / "pictures" / HOSTILE, "yellow")
    write_image(folder / "pictures" / os.fsdecode(b"gr\xfcn.png"), "green")
    (folder / "fruit.pdf").write_bytes(pdf(["apples and pears", "plums"], title="Fruit <b>"))
    (folder / "notes.md").write_text("# Garden\nRoses & <img src=x onerror=alert(1)>.\n# Kitchen\nKnives.\n")
    return folder


@pytest.fixture(scope="module")
def searcher(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    encoder = FakeEncoder()
    store = IndexStore.create(tmp_path_factory.mktemp("store"), identity_of(encoder))
    ingest([folder], store, encoder)
    return Searcher(store, encoder)


def test_words_and_pictures_find_pictures(searcher: Searcher, folder: Path) -> None:
    first = searcher.search("something red")[0]
    assert (first.path, first.kind, first.page, first.section) == (folder / "pictures" / "red.png", "image", None, None)
    assert (first.width, first.height) == (40, 30) and first.thumbnail[8:12] == b"WEBP"
    blue = folder / "pictures" / "blue.png"
    assert searcher.search(blue)[0].score == pytest.approx(1, abs=1e-5)
    assert searcher.search(Item(image=Image.open(blue), text="blue"))[0].path == blue


def test_kind_place_and_number(searcher: Searcher, folder: Path) -> None:
    assert {hit.page for hit in searcher.search("pears", kind="page")} == {1, 2}
    sections = searcher.search("knives in the kitchen", kind="text")
    assert (sections[0].section, sections[0].title, sections[0].snippet) == (2, "Kitchen", "Knives.")
    assert {hit.path for hit in searcher.search("red", within=folder / "notes.md")} == {folder / "notes.md"}
    assert [hit.path.name for hit in searcher.search("yellow", within=folder / "pictures", top_k=1)] == [HOSTILE]
    assert searcher.search("red", within=folder / "nothing") == []


@pytest.mark.parametrize("query", ["", "  \n", Item(), Item(text=" ", image=[])])
def test_empty_query(searcher: Searcher, query: Any) -> None:
    with pytest.raises(InputError, match="The query is empty: give it words, a picture, or both"):
        searcher.search(query)


def test_query_picture_that_cannot_be_read(searcher: Searcher, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"missing\.png"):
        searcher.search(tmp_path / "missing.png")


def test_instructions() -> None:
    assert instruction_of("text", "page") == QUERY_INSTRUCTIONS["t2vd"]
    assert instruction_of("image,text", "text") == QUERY_INSTRUCTIONS["it2t"]
    assert instruction_of("image", "page") == instruction_of("image", None) == QUERY_INSTRUCTIONS["i2i"]


def test_snippets() -> None:
    text = " ".join(f"word{number}" for number in range(200))
    assert snippet("short", "query") == "short"
    assert snippet(text, "nothing shared").startswith("word0 word1")
    inside = snippet(text, "where is WORD150?")
    assert "word150" in inside and inside.startswith("… ") and inside.endswith(" …") and len(inside) <= 204
    assert snippet(text, "word199").endswith("word199")
    assert snippet("x" * 500, "(") == "x" * 200 + " …"


class Page(HTMLParser):
    """Tags, links and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_both_orders_and_both_scores_are_shown(searcher: Searcher, tmp_path: Path) -> None:
    hits = searcher.search("red", top_k=3)
    judged = [replace(hits[1], rerank_score=0.875), replace(hits[0], rerank_score=0.25), hits[2]]
    write_contact_sheet(tmp_path / "sheet.html", [("red", {"Plain": hits, "<Judged>": judged})])
    page = Page((tmp_path / "sheet.html").read_text(encoding="utf-8"))
    assert page.tags.count("section") == 1 and page.tags.count("ol") == 2 and page.tags.count("li") == 6
    for visible in ("Plain", "<Judged>", "3 results", f"0.875cosine {hits[1].score:.3f}", f"{hits[2].score:.3f}"):
        assert visible in page.text
    assert [value for name, value in page.attributes if name == "style"][3:5] == ["width:88%", "width:25%"]
    write_contact_sheet(tmp_path / "sheet.html", [("red", {"Plain": []})])
    assert "Nothing was found" in (tmp_path / "sheet.html").read_text(encoding="utf-8")


def test_contact_sheet(searcher: Searcher, folder: Path, tmp_path: Path) -> None:
    words = Item(text="<script>red</script>")
    both = Item(image=folder / "pictures" / "blue.png", text="the same")
    results = [(words, searcher.search(words, top_k=20)), (both, searcher.search(both)), ("nothing", [])]
    write_contact_sheet(tmp_path / "sheet.html", results, title="<Title>")
    html = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags and "b" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    sources = [value or "" for name, value in page.attributes if name == "src"]
    assert len(sources) == 1 + 2 * 7 and all(source.startswith("data:image/webp;base64,") for source in sources)
    links = {value for name, value in page.attributes if name == "href"}
    assert f"file://{folder}/fruit.pdf#page=2" in links and f"file://{folder}/pictures/gr%FCn.png" in links
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", html), "nothing comes from elsewhere"
    for visible in ("<script>red</script>", "page 2", "Fruit <b>", "Roses & <img src=x onerror=alert(1)>.", "<Title>"):
        assert visible in page.text
    assert r"gr\udcfcn.png" in page.text and "Nothing was found" in page.text
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.html"]
