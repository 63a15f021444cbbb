"""Pictures from files, bytes and archives: always RGB, always upright, never a surprise in size.

Formats are limited to raster decoders that live inside Pillow: others (EPS, for one) would start foreign programs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import stat
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from quarterlight.errors import ImageError
from quarterlight.records import ArchiveMember, ImageSource

MAX_PIXELS = 178_956_970
"""Width times height above which a picture is refused unread: the point where Pillow calls it a decompression bomb."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "ICO", "PPM", "TGA", "PCX", "QOI")
"""Pillow's names of the formats that are read."""

# Pillow decodes an opened picture when it is first needed. Two threads that need the same one at once read its file in
# turns: broken data, or wrong pixels without an error. So whoever looks at an opened picture holds its lock; pictures
# cannot be keys, hence one lock for all whose address leaves the same rest.
_LOCKS = tuple(threading.Lock() for _ in range(61))

# EXIF orientation (tag 0x0112) -> what brings the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns at half the limit above, which is the size of an ordinary phone picture; the limit here is ours.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Its other complaints are about metadata that nothing here reads (UserWarning: Corrupt EXIF data).
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS, reduce_to: int | None = None) -> Image.Image:
    """The first frame of a picture: RGB, 8 bits, upright, transparency on white.

    source: a file, its bytes, an opened picture or a member of a zip archive.
    max_pixels: width x height above which nothing is decoded; at most ``MAX_PIXELS``.
    reduce_to: allows the picture to be shrunk by a whole factor while it is decoded (much faster for large JPEGs) as
        long as its shortest side keeps at least so many pixels; ``None`` keeps every pixel.
    Threads may load the same opened picture at once.
    Raises ImageError, naming the source, when it cannot be read, is no picture, is truncated, empty or too large.
    """
    with _opened(source) as image:
        if image.width * image.height > max_pixels:
            raise ImageError(
                f"{describe(source)} is refused as a decompression bomb: it claims {image.width:,} x "
                f"{image.height:,} pixels, more than {max_pixels:,} in all."
            )
        if reduce_to and image is not source:
            image.draft("", (reduce_to, reduce_to))  # a JPEG decodes straight to 1/2, 1/4 or 1/8; others do nothing
        try:
            image.load()
            orientation = _orientation(image)
            picture = _to_rgb(image)
            factor = min(picture.size) // reduce_to if reduce_to else 1
            if factor > 1:
                picture = picture.reduce(factor)
            if orientation not in _UPRIGHT:
                return picture
            upright = picture.transpose(_UPRIGHT[orientation])
            upright.info = {}  # or its EXIF would have it turned again when it is loaded once more
            return upright
        except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... for damaged data
            raise ImageError(f"{describe(source)} cannot be decoded: {_reason(error)}.") from error


def image_size(source: ImageSource) -> tuple[int, int]:
    """Width and height of the upright picture in pixels, from its header.  Raises ImageError as above."""
    with _opened(source) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def content_hash(source: ImageSource) -> str:
    """SHA-256, in hex, of the file's bytes; of mode, size, palette and pixels when ``source`` is an opened picture.

    Raises ImageError when the source cannot be read.
    """
    if isinstance(source, Image.Image):
        with _opened(source):
            digest = hashlib.sha256(f"{source.mode} {source.size} {source.getpalette()}".encode())
            digest.update(source.tobytes())
        return digest.hexdigest()
    with _stream(source) as stream:
        try:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
        except (OSError, zipfile.BadZipFile) as error:
            raise ImageError(f"{describe(source)} cannot be read: {_reason(error)}.") from error


def image_bytes(source: ImageSource) -> bytes:
    """The picture as a file: the bytes of its own, or a PNG of an opened picture.  Raises ImageError as above."""
    if isinstance(source, Image.Image):
        stream = io.BytesIO()
        with _opened(source):
            source.save(stream, "PNG")
        return stream.getvalue()
    with _stream(source) as file:
        try:
            return file.read()
        except OSError as error:
            raise ImageError(f"{describe(source)} cannot be read: {_reason(error)}.") from error


def describe(source: ImageSource) -> str:
    """A printable name for messages, on one line whatever bytes a file name holds.

    >>> describe("two\\nlines.png")
    'two\\\\nlines.png'
    """
    if isinstance(source, Image.Image):
        return f"a {source.mode} picture of {source.width} x {source.height} pixels"
    if isinstance(source, bytes):
        return f"a picture of {len(source):,} bytes"
    if isinstance(source, ArchiveMember):
        return f"{describe(source.archive)}:{describe(source.member)}"
    name = os.fsdecode(source)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


@contextlib.contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """The picture with its header read and its pixels still to decode; an opened one is nobody else's meanwhile."""
    if isinstance(source, Image.Image):
        with _LOCKS[id(source) % len(_LOCKS)]:
            if not all(source.size):
                raise ImageError(f"{describe(source)} is empty: expected at least one pixel.")
            yield source
        return
    with _stream(source) as stream:
        if not stream.read(1):
            raise ImageError(f"{describe(source)} is empty (0 bytes): expected a picture.")
        stream.seek(0)
        try:
            image = Image.open(stream, formats=_known_formats())
        except UnidentifiedImageError as error:
            raise ImageError(
                f"{describe(source)} is not a picture in a known format ({', '.join(_known_formats())})."
            ) from error
        except Image.DecompressionBombError as error:
            raise ImageError(f"{describe(source)} is refused as a decompression bomb: {_reason(error)}.") from error
        except Exception as error:  # a decoder that meets a broken header raises whatever it tripped over
            raise ImageError(f"{describe(source)} cannot be opened as a picture: {_reason(error)}.") from error
        with image:
            yield image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image if type(image) is Image.Image else image.copy()  # a copy lets go of the file
    if image.mode.startswith(("I", "F")):
        return _grey_from_deep(np.asarray(image)).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")


def _grey_from_deep(value_HW: np.ndarray[Any, Any]) -> Image.Image:
    """8-bit grey from 16-bit, 32-bit or float samples, whose full scale is 255, 65535 or 1 where they fit, else their
    maximum. (Pillow's own conversion clips at 255, which turns 16-bit scans white.)"""
    full_scales = (1.0, 255.0, 65535.0) if value_HW.dtype.kind == "f" else (255.0, 65535.0)
    value_HW = np.nan_to_num(value_HW.astype(np.float32), posinf=0.0, neginf=0.0)
    top = float(value_HW.max(initial=0.0))
    scale = next((s for s in full_scales if top <= s), top)
    return Image.fromarray(np.clip(np.rint(value_HW * (255.0 / scale)), 0, 255).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF says nothing about the pixels: keep them as they are
        return 1


def _stream(source: str | os.PathLike[str] | bytes | ArchiveMember) -> BinaryIO:
    """A readable, seekable stream. Raises ImageError when there is none."""
    try:
        if isinstance(source, bytes):
            return io.BytesIO(source)
        if isinstance(source, ArchiveMember):
            archive = _archive(source.archive, Path(source.archive).stat().st_mtime_ns, os.getpid())
            return io.BytesIO(archive.read(source.member))
        path = Path(source)
        if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for ever
            raise ImageError(f"{describe(source)} is not a regular file: expected a picture.")
        return path.open("rb")
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{describe(source)} cannot be read: {_reason(error)}.") from error


@functools.lru_cache(maxsize=16)
def _archive(path: str, mtime_ns: int, pid: int) -> zipfile.ZipFile:
    """An open archive, kept because its directory is slow to parse; one for each process, since forked processes would
    move one another's place in a shared file."""
    return zipfile.ZipFile(path)


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _reason(error: BaseException) -> str:
    """What went wrong, in one line without a full stop and without the file name, which the caller has given."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__
