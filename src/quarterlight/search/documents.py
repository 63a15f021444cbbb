"""A file taken apart into what is embedded: a picture, the pages of a PDF, the sections of a text.

Each reader yields parts one after the other, so that a long PDF is never in memory as a whole, and problems with single
pages in between.  What is wrong with the whole file is raised as InputError, whose message starts with the file's name.
"""

from __future__ import annotations

import codecs
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pypdfium2 as pdfium
from PIL import Image

from quarterlight.errors import InputError
from quarterlight.images import describe, image_size, load_image
from quarterlight.index import Kind, Row
from quarterlight.index.rows import uri_of
from quarterlight.records import Item
from quarterlight.search.encoder import Pictures
from quarterlight.search.sections import Section, markdown_sections, plain_sections
from quarterlight.search.walk import FoundFile

PAGE_PIXELS = 896
"""Longest side of a rendered page: two tiles of InternVL, of which a page gets two or four."""

TILES: dict[Kind, int] = {"image": 1, "page": 4}
"""The most tiles of a picture and of a page, thumbnail not counted (Magic-MM-Embedding, section 5.2)."""

MAX_TEXT_BYTES = 16 * 2**20
"""A larger text file is data rather than something to read, and is reported instead."""

MAX_PAGE_CHARS = 20_000
"""Where the text layer kept of one page ends."""

THUMBNAIL_PIXELS = 320
THUMBNAIL_BYTES = 32 * 2**10

_THUMBNAIL_SOURCE_PIXELS = 448
"""Shortest side to which a picture is quickly reduced before its thumbnail is made."""

_pdfium_lock = threading.Lock()  # PDFium is not thread-safe, not even for two documents


@dataclass(frozen=True, kw_only=True)
class Part:
    """What becomes one row; fields as in :class:`quarterlight.index.Row`, ``item`` is what the model gets."""

    item: Item
    kind: Kind
    part: int
    width: int = 0
    height: int = 0
    thumbnail: bytes = b""
    text: str = ""
    title: str = ""

    def row(self, file: FoundFile, content_hash: str) -> Row:
        """What the table says of it; what went wrong with other parts of the file is for the caller to add."""
        return Row(
            uri=uri_of(file.path),
            kind=self.kind,
            part=self.part,
            size=file.size,
            mtime_ns=file.mtime_ns,
            content_hash=content_hash,
            width=self.width,
            height=self.height,
            thumbnail=self.thumbnail,
            text=self.text,
            title=self.title,
        )


@dataclass(frozen=True)
class BrokenPart:
    """A page that cannot be read; the reason is a sentence."""

    reason: str


class Picture(NamedTuple):
    """A picture file as the model gets it, its size in the file, in pixels, and its thumbnail."""

    image: Image.Image
    width: int
    height: int
    thumbnail: bytes


def read_parts(file: FoundFile, pictures: Pictures) -> Iterator[Part | BrokenPart]:
    """Everything in a file that can be found.  Raises InputError when there is nothing, or it cannot be read.

    pictures: the model's.
    """
    match file.reader:
        case "image":
            yield _read_image(file.path, pictures)
        case "pdf":
            yield from _read_pages(file.path)
        case "markdown":
            yield from _text_parts(file.path, markdown_sections(_read_text(file.path)))
        case "text":
            yield from _text_parts(file.path, plain_sections(_read_text(file.path)))


def read_picture(path: str, max_tiles: int | None, pictures: Pictures) -> Picture:
    """A picture file.  Raises ImageError when it cannot be read.

    max_tiles: of its item.  pictures: the model's, so that it makes of this what it makes of the file.
    """
    image = pictures.read(path, max_tiles)
    width, height = image_size(path)
    is_whole = image.size == (width, height)
    small = load_image(image if is_whole else path, reduce_to=_THUMBNAIL_SOURCE_PIXELS)
    return Picture(pictures.fit(image, max_tiles), width, height, thumbnail(small))


def read_again(path: str, kind: Kind, part: int, pictures: Pictures) -> Item:
    """The picture, or the one page, that was indexed as this part of a file, as the model gets it.

    pictures: of the model that is to see it.

    Of the sections of texts the table has the words: see :func:`section_item`.
    Raises InputError, whose message starts with the file's name, when the file has no such part or cannot be read.
    """
    if kind == "image":
        return Item(image=pictures.fit(pictures.read(path, TILES[kind]), TILES[kind]), max_tiles=TILES[kind])
    assert kind == "page", kind
    document = _open_pdf(path)
    try:
        with _pdfium_lock:
            num_pages = len(document)
            if not 1 <= part <= num_pages:
                raise InputError(f"{describe(path)} has no page {part} any more: it has {num_pages}.")
            try:
                image, _, _ = _render(document, part - 1)
            except Exception as error:  # whatever a damaged page trips, a search must not end for it
                reason = str(error).rstrip(".")
                raise InputError(f"{describe(path)} page {part} of {num_pages} cannot be read: {reason}.") from error
    finally:
        with _pdfium_lock:
            document.close()
    return Item(image=image, max_tiles=TILES[kind])


def place_of(kind: Kind, part: int) -> str:
    """Where in a file, for the beginning of a reason: ``"page 3 "``, or nothing for a picture."""
    return {"image": "", "page": f"page {part} ", "text": f"section {part} "}[kind]


def reason_of(error: Exception, path: str) -> str:
    """Why a file cannot be read, for a sentence that begins with its name."""
    if isinstance(error, InputError):
        return str(error).removeprefix(describe(path)).strip().rstrip(".")
    # damaged data trips decoders in ways nobody foresaw; one file must not end the job
    return f"cannot be read: {type(error).__name__}: {describe(str(error))}"


def section_item(title: str, text: str) -> Item:
    """A section of a text as the model gets it."""
    return Item(text=f"{title}\n\n{text}" if title else text)


def thumbnail(image: Image.Image) -> bytes:
    """A WebP picture of at most 320 pixels a side and 32 KB."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), reducing_gap=2.0)
    for quality in (75, 50, 25, 0):  # 32 KB are rarely reached: the first try fits all but noise
        stream = io.BytesIO()
        small.save(stream, "WEBP", quality=quality, method=1)
        if stream.tell() <= THUMBNAIL_BYTES:
            break
    return stream.getvalue()


def _read_image(path: str, pictures: Pictures) -> Part:
    image, width, height, small = read_picture(path, TILES["image"], pictures)
    item = Item(image=image, max_tiles=TILES["image"])
    return Part(item=item, kind="image", part=0, width=width, height=height, thumbnail=small)


def _read_pages(path: str) -> Iterator[Part | BrokenPart]:
    document = _open_pdf(path)
    try:
        with _pdfium_lock:
            num_pages = len(document)
            title = clean(document.get_metadata_value("Title"))
        if not num_pages:
            raise InputError(f"{describe(path)} has no pages.")
        for number in range(1, num_pages + 1):
            try:
                with _pdfium_lock:
                    image, text, size = _render(document, number - 1)
            except (pdfium.PdfiumError, ValueError, MemoryError) as error:
                yield BrokenPart(f"page {number} of {num_pages} cannot be read: {str(error).rstrip('.')}")
                continue
            yield Part(
                item=Item(image=image, max_tiles=TILES["page"]),
                kind="page",
                part=number,
                width=round(size[0]),
                height=round(size[1]),
                thumbnail=thumbnail(image),
                text=clean(text)[:MAX_PAGE_CHARS],
                title=title,
            )
    finally:
        with _pdfium_lock:
            document.close()


def _open_pdf(path: str) -> pdfium.PdfDocument:
    try:
        # by its name, PDFium could not open what is not UTF-8; the document closes it
        file = Path(path).open("rb")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{describe(path)} cannot be read: {error.strerror}.") from error
    try:
        if not file.read(1):
            file.close()
            raise InputError(f"{describe(path)} is empty (0 bytes): expected a PDF.")
        with _pdfium_lock:
            return pdfium.PdfDocument(file, autoclose=True)
    except pdfium.PdfiumError as error:
        file.close()
        if "password" in str(error).lower():
            raise InputError(f"{describe(path)} is encrypted: save a copy without password to index it.") from error
        raise InputError(f"{describe(path)} is not a PDF that can be read: {str(error).rstrip('.')}.") from error


def _render(document: pdfium.PdfDocument, index: int) -> tuple[Image.Image, str, tuple[float, float]]:
    """Picture, text layer and size in points of a page.  Called with the lock held."""
    page = document[index]
    try:
        width, height = page.get_size()
        if not (width > 0 and height > 0):
            raise ValueError(f"its size is {width:g} x {height:g} points")
        bitmap = page.render(scale=PAGE_PIXELS / max(width, height), rev_byteorder=True)
        try:
            image = bitmap.to_pil().convert("RGB").copy()  # to_pil() shares memory with the bitmap
        finally:
            bitmap.close()
        text_page = page.get_textpage()
        try:
            return image, text_page.get_text_range(), (width, height)
        finally:
            text_page.close()
    finally:
        page.close()


def _read_text(path: str) -> str:
    """The words of a file in UTF-8, UTF-16 with its mark, or else Windows-1252, which is what remains in practice."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise InputError(f"{describe(path)} cannot be read: {error.strerror}.") from error
    if len(data) > MAX_TEXT_BYTES:
        raise InputError(f"{describe(path)} is larger than {MAX_TEXT_BYTES >> 20} MB, too large for a text.")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    if b"\0" in data:
        raise InputError(f"{describe(path)} is not a text: it holds zero bytes.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def _text_parts(path: str, sections: list[Section]) -> Iterator[Part]:
    if not sections:
        raise InputError(f"{describe(path)} is empty: expected a text.")
    for number, (title, text) in enumerate(sections, start=1):
        yield Part(item=section_item(title, text), kind="text", part=number, text=clean(text), title=clean(title))


def clean(text: str) -> str:
    """Text that UTF-8 can hold, without control characters other than line breaks and tabs."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", errors="replace").decode()
    return "".join(c for c in text if c >= " " or c in "\n\t").strip()
