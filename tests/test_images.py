"""Pictures of every make come out upright, RGB and in 8 bits; what is no picture is refused with its name."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quarterlight.errors import ImageError
from quarterlight.images import content_hash, describe, image_bytes, image_size, load_image
from quarterlight.records import ArchiveMember


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def near(image: Image.Image, colour: tuple[int, int, int], at: tuple[int, int] = (0, 0), by: int = 3) -> bool:
    assert image.mode == "RGB"
    return all(abs(got - wanted) <= by for got, wanted in zip(image.getpixel(at), colour, strict=True))


RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = Image.new("RGB", (40, 24), "white")
    upright.paste("red", (0, 0, 8, 8))  # top left is red, wherever the camera was held
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "JPEG", exif=exif, quality=95)
    image = load_image(data)
    assert image.size == upright.size == image_size(data)
    assert near(image, RED, (2, 2), by=8)
    assert near(image, WHITE, (37, 21), by=8)


def test_an_upright_picture_stays_upright_when_it_is_loaded_again() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("RGB", (20, 40)).save(stream, "JPEG", exif=exif)
    once = load_image(stream.getvalue())
    assert once.size == (40, 20)
    assert load_image(once).size == (40, 20)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_ignored() -> None:
    data = encoded(Image.new("RGB", (9, 9), "red"), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\x01")
    assert load_image(data).size == (9, 9)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode: str) -> None:
    clear = Image.new(mode, (4, 4), (0,) * len(mode))
    assert near(load_image(encoded(clear, "PNG")), WHITE)
    assert near(load_image(clear), WHITE)


def test_transparency_of_palette_and_of_one_colour() -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.putpixel((1, 1), 1)
    image = load_image(encoded(palette, "PNG", transparency=0))
    assert near(image, WHITE) and near(image, RED, (1, 1))
    assert near(load_image(encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))), WHITE)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert near(load_image(data), RED, (4, 4), by=6), kind


def test_cmyk_and_grey_and_bilevel() -> None:
    assert near(load_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)), RED, by=6)
    assert near(load_image(encoded(Image.new("L", (4, 4), 77), "PNG")), (77, 77, 77))
    assert near(load_image(encoded(Image.new("1", (4, 4), 1), "PNG")), WHITE)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (np.full((3, 3), 32896, np.uint16), 128),
        (np.full((3, 3), 1000, np.uint16), 4),
        (np.full((3, 3), 77, np.int32), 77),
        (np.full((3, 3), 0.5, np.float32), 128),
        (np.array([[np.nan, 0.5]], np.float32), 0),
    ],
)
def test_deep_samples_keep_their_scale(samples: np.ndarray, expected: int) -> None:
    if samples.dtype == np.uint16:  # Pillow's own conversion would clip to white
        assert near(load_image(encoded(Image.fromarray(samples), "PNG")), (expected,) * 3)
    assert near(load_image(encoded(Image.fromarray(samples), "TIFF")), (expected,) * 3)


def test_reduce_to_keeps_the_shortest_side() -> None:
    large = Image.new("RGB", (1000, 650), "red")
    for kind in ("JPEG", "PNG"):
        image = load_image(encoded(large, kind), reduce_to=100)
        assert 100 <= min(image.size) < 200 and near(image, RED, by=6)
    assert load_image(large, reduce_to=700).size == large.size
    assert load_image(Image.new("RGB", (1, 4000)), reduce_to=448).size == (1, 4000)


def test_an_opened_picture_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    Image.new("RGB", (800, 800), "red").save(path)
    with Image.open(path) as opened:
        assert load_image(opened, reduce_to=100).size == (100, 100)
        assert opened.size == (800, 800)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_threads_may_load_one_opened_picture_at_once(kind: str) -> None:
    data = encoded(Image.effect_noise((600, 600), 80).convert("RGB"), kind)
    expected = np.asarray(load_image(data))
    hashed = content_hash(Image.fromarray(expected))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            with Image.open(io.BytesIO(data)) as opened:  # whose pixels nobody has read yet
                *loaded, found = [pool.submit(read, opened) for read in (load_image, load_image, content_hash)]
                assert all(np.array_equal(np.asarray(one.result()), expected) for one in loaded)
                assert found.result() == hashed


@pytest.mark.parametrize("size", [(5, 0), (0, 5), (0, 0)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]) -> None:
    for read in (load_image, image_size):
        with pytest.raises(ImageError, match=rf"picture of {size[0]} x {size[1]} pixels is empty"):
            read(Image.new("RGB", size))


def test_sources(tmp_path: Path) -> None:
    data = encoded(Image.new("RGB", (5, 7), "red"), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/a.png", data)
    member = ArchiveMember(str(tmp_path / "a.zip"), "in/a.png")
    for source in (path, str(path), data, member, load_image(data)):
        assert near(load_image(source), RED)
    assert content_hash(path) == content_hash(data) == content_hash(member) != content_hash(load_image(data))
    assert describe(member).endswith("a.zip:in/a.png")


JPEG = encoded(Image.effect_noise((64, 64), 80), "JPEG")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("empty.jpg", b"", "is empty"),
        ("words.png", b"not a picture at all", "not a picture in a known format"),
        ("half.jpg", JPEG[: len(JPEG) // 2], "truncated"),
        ("head.jpg", JPEG[:8], "cannot be"),
        ("half.png", encoded(Image.effect_noise((64, 64), 80), "PNG")[:900], "cannot be decoded"),
        ("bomb.png", png_header(50_000, 50_000), "decompression bomb"),
        ("thin.png", png_header(10_000, 1_000), "cannot be decoded"),
        ("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a picture"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ImageError, match=says) as caught:
        load_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_own_limit_counts_pixels_before_reduction() -> None:
    data = encoded(Image.new("RGB", (100, 100)), "JPEG")
    assert load_image(data, max_pixels=10_000).size == (100, 100)
    with pytest.raises(ImageError, match="100 x 100 pixels"):
        load_image(data, max_pixels=9_999, reduce_to=10)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    for path in (
        tmp_path,
        tmp_path / "pipe.png",
        tmp_path / "missing.png",
        ArchiveMember(str(tmp_path / "no.zip"), "a"),
    ):
        with pytest.raises(ImageError):
            load_image(path)
    (tmp_path / "not.zip").write_bytes(b"nonsense")
    for read in (load_image, content_hash):
        with pytest.raises(ImageError, match="not a zip"):
            read(ArchiveMember(str(tmp_path / "not.zip"), "a.png"))


def test_bytes_of_a_picture(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 3), RED)
    data = encoded(picture, "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jpg", data)
    for source in (data, tmp_path / "a.jpg", ArchiveMember(str(tmp_path / "a.zip"), "a.jpg")):
        assert image_bytes(source) == data
    assert np.array_equal(np.asarray(load_image(image_bytes(picture))), np.asarray(picture))
    with pytest.raises(ImageError, match=r"missing\.jpg cannot be read"):
        image_bytes(tmp_path / "missing.jpg")
