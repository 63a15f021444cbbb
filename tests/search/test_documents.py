"""Files taken apart: sections, pages, thumbnails."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image
from tests.search.fakes import FakePictures
from tests.search.files import pdf, write_image

from quarterlight.errors import InputError
from quarterlight.records import Item
from quarterlight.search.documents import BrokenPart, Part, read_again, read_parts, section_item, thumbnail
from quarterlight.search.sections import markdown_sections, plain_sections
from quarterlight.search.walk import FoundFile, Reader

PICTURES = FakePictures()


def parts(path: Path, reader: Reader) -> list[Part | BrokenPart]:
    return list(read_parts(FoundFile(str(path), reader, 0, 0), PICTURES))


def test_markdown_by_heading() -> None:
    text = "Before.\n# A\nOne.\n\n```sh\n# no heading\n```\n## B ##\n### C\nTwo.\n## D\nThree.\n"
    assert [tuple(section) for section in markdown_sections(text)] == [
        ("", "Before."),
        ("A", "One.\n\n```sh\n# no heading\n```"),
        ("A > B > C", "Two."),
        ("A > D", "Three."),
    ]
    assert markdown_sections("# Only a heading") == plain_sections("# Only a heading")
    assert markdown_sections(" \n\n") == []


def test_sections_are_bounded_and_lose_nothing() -> None:
    text = "\n\n".join(["short one", "word " * 100, "x" * 250, "last"])
    blocks = [section.text for section in plain_sections(text, max_chars=100)]
    assert all(0 < len(block) <= 100 for block in blocks)
    assert "".join("".join(blocks).split()) == "".join(text.split())


def test_pages(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf(["apples", None, "pears"], title="Fruit"))
    first, second, third = parts(path, "pdf")
    assert isinstance(first, Part) and isinstance(third, Part)
    assert (first.part, first.text, first.title, first.width, first.height) == (1, "apples", "Fruit", 600, 800)
    assert first.item.max_tiles == 4 and max(first.item.images[0].size) <= 900
    assert isinstance(second, BrokenPart) and second.reason.startswith("page 2 of 3 cannot be read")
    assert (third.part, third.text) == (3, "pears")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (pdf(["a"], encrypted=True), "is encrypted"),
        (pdf(["a"])[:150], "is not a PDF that can be read"),
        (b"", "is empty"),
        (pdf([]), "has no pages|not a PDF"),
    ],
)
def test_bad_pdfs(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(data)
    with pytest.raises(InputError, match=says):
        parts(path, "pdf")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Größe\r\n\r\nzwei".encode(encoding))
    (part,) = parts(path, "text")
    assert isinstance(part, Part) and part.text == "Größe\n\nzwei"


@pytest.mark.parametrize(
    ("data", "says"), [(b" \n", "is empty"), (b"a\0b", "zero bytes"), (b"a" * (17 << 20), "larger")]
)
def test_bad_texts(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=says):
        parts(path, "text")


def test_image_keeps_its_size(tmp_path: Path) -> None:
    (part,) = parts(write_image(tmp_path / "a.jpg", "red", (2000, 1500)), "image")
    assert isinstance(part, Part) and (part.width, part.height) == (2000, 1500)
    assert isinstance(part.item.image, Image.Image) and part.item.image.size == (2000, 1500)


def test_thumbnails_are_small() -> None:
    noise = Image.frombytes("RGB", (1000, 700), os.urandom(3 * 1000 * 700))
    for image in (noise, Image.new("RGB", (1, 4000)), Image.new("RGB", (3, 2))):
        data = thumbnail(image)
        assert len(data) <= 32 * 1024
        small = Image.open(io.BytesIO(data))
        assert small.format == "WEBP" and max(small.size) <= 320


def pixels(item: Item) -> bytes:
    (image,) = item.images
    assert isinstance(image, Image.Image)
    return image.tobytes()


def test_one_part_is_read_again_as_it_was(tmp_path: Path) -> None:
    (picture,) = parts(write_image(tmp_path / "a.png", "red", (2000, 1500)), "image")
    assert isinstance(picture, Part)
    again = read_again(str(tmp_path / "a.png"), "image", 0, PICTURES)
    assert pixels(again) == pixels(picture.item) and again.max_tiles == picture.item.max_tiles == 1

    path = tmp_path / "a.pdf"
    path.write_bytes(pdf(["apples", None, "pears"]))
    first, _, third = parts(path, "pdf")
    assert isinstance(first, Part) and isinstance(third, Part)
    for page in (first, third):
        again = read_again(str(path), "page", page.part, PICTURES)
        assert pixels(again) == pixels(page.item) and again.max_tiles == page.item.max_tiles == 4
    assert pixels(first.item) != pixels(third.item)
    with pytest.raises(InputError, match=r"a\.pdf page 2 of 3 cannot be read"):
        read_again(str(path), "page", 2, PICTURES)
    with pytest.raises(InputError, match=r"a\.pdf has no page 4 any more: it has 3"):
        read_again(str(path), "page", 4, PICTURES)
    path.unlink()
    with pytest.raises(InputError, match=r"a\.pdf cannot be read: No such file"):
        read_again(str(path), "page", 1, PICTURES)


def test_a_section_as_the_model_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("Before.\n# Title\nWords.\n")
    for part in parts(path, "markdown"):
        assert isinstance(part, Part) and section_item(part.title, part.text) == part.item
