"""Captions of videos find the video: MSR-VTT and MSVD.  A video is a candidate with several pictures, its frames.

    MSR-VTT   annotations/MSRVTT_JSFUSION_test.csv     video_id, sentence; the pool is its 1000 videos
              videos/<video_id>.mp4
    MSVD      test_list.txt                            a name a line
              raw-captions.pkl                         name -> list of lists of words; also as .json
              YouTubeClips/<name>.avi
              every caption of a video is a query

Frames are decoded once, evenly over the video, and kept as JPEG files beside the other pictures of tables, with a list
of them for each video, by its path, size and time of change, and the number of frames.  Needs PyAV:
``pip install -e '.[video]'``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from quarterlight.data.benchmarks.builder import TaskBuilder
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.benchmarks.tables import Place, read_json, read_rows
from quarterlight.data.retrieval import RetrievalTask
from quarterlight.errors import DatasetError
from quarterlight.files import replace_file
from quarterlight.records import ImageSource

NUM_FRAMES = 12
"""Frames of a video that are looked at, as LamRA and U-MARVEL take of MSVD."""


def load_msrvtt(source: Source) -> RetrievalTask:
    """The 1000 pairs of the usual test split.  Options: ``file``, ``frames``.

    Videos that cannot be read are listed, with their captions.  Raises DatasetError for a table that breaks the layout,
    and without PyAV.
    """
    path = source.folder / source.option("file", "annotations/MSRVTT_JSFUSION_test.csv")
    rows = list(read_rows(path, ("video_id", "sentence")))
    captions = [(place, place.text(row, "video_id"), place.text(row, "sentence")) for place, row in rows]
    folders = [source.folder / "videos", source.folder / "videos" / "all", source.folder]
    return _load(source, captions, folders, (".mp4", ".avi", ".webm"))


def load_msvd(source: Source) -> RetrievalTask:
    """Every caption of the test videos.  Options: ``file``, ``captions``, ``frames``.  Raises as above."""
    root = source.folder
    listed = root / source.option("file", "test_list.txt")
    words = _msvd_captions(root, source.option("captions", "raw-captions.pkl"))
    try:
        names = listed.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DatasetError(f"{listed} cannot be read ({error.strerror}).") from error
    captions = []
    for number, name in enumerate((one.strip() for one in names), 1):
        if name and name not in words:
            Place(listed, number).fail(f"the video {name!r} has no captions in {root}")
        captions += [(Place(listed, number), name, text) for text in words.get(name, ())]
    return _load(source, captions, [root / "YouTubeClips", root], (".avi", ".mp4"))


def sample_frames(path: Path, count: int) -> list[bytes]:
    """``count`` frames of a video as JPEG, from the middles of as many equal parts; fewer when it has fewer.

    Raises DatasetError, as the end of a sentence, for a video that cannot be decoded.
    """
    av = _pyav()
    try:
        with av.open(str(path)) as video:
            stream = video.streams.video[0]
            stream.thread_type = "AUTO"
            total = stream.frames or sum(1 for _ in video.decode(video=0))
        wanted = sorted({int((number + 0.5) * total / count) for number in range(count)})
        found: list[bytes] = []
        with av.open(str(path)) as video:
            for number, frame in enumerate(video.decode(video=0)):
                if number == wanted[len(found)]:
                    data = io.BytesIO()
                    frame.to_image().save(data, "JPEG", quality=95)
                    found.append(data.getvalue())
                    if len(found) == len(wanted):
                        break
    except (av.error.FFmpegError, OSError, IndexError, ValueError) as error:
        raise DatasetError(f"the video {path} cannot be decoded ({error})") from error
    if not found:
        raise DatasetError(f"the video {path} has no frames")
    return found


def _load(
    source: Source, captions: Iterable[tuple[Place, str, str]], folders: Sequence[Path], endings: Sequence[str]
) -> RetrievalTask:
    _pyav()  # before anything is read
    count = int(source.option("frames", str(NUM_FRAMES)))
    builder = TaskBuilder(source)
    bad: set[str] = set()
    numbers: dict[str, int] = {}
    for place, name, text in captions:
        if name not in builder.candidates and name not in bad:
            try:
                frames = _frames(source, name, count, folders, endings)
                builder.candidate(place, name, builder.item("", *frames))
            except DatasetError as error:
                bad.add(name)
                builder.leave_out(name, f"{place}: {error}")
        numbers[name] = numbers.get(name, -1) + 1
        builder.query(place, f"{name}-{numbers[name]}", builder.item(text), [] if name in bad else [name])
    return builder.build()


def _frames(
    source: Source, name: str, count: int, folders: Sequence[Path], endings: Sequence[str]
) -> list[ImageSource]:
    for folder in folders:
        for ending in endings:
            path = folder / f"{name}{ending}"
            if path.is_file():
                return _kept_frames(source, path, count)
    raise DatasetError(f"the video {name}{endings[0]} is not in {', '.join(map(str, folders))}")


def _kept_frames(source: Source, path: Path, count: int) -> list[ImageSource]:
    """The frames of a video; where pictures are kept as files, those of an unchanged video without decoding it."""
    if source.pictures is None:
        return [source.keep(frame) for frame in sample_frames(path, count)]
    stat = path.stat()
    video = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {count}"
    listed = source.pictures / "frames" / f"{hashlib.sha256(video.encode()).hexdigest()}.json"
    if listed.is_file():
        frames = [str(source.pictures / name) for name in read_json(listed)]
        if all(map(os.path.exists, frames)):
            return list(frames)
    kept = [source.keep(frame) for frame in sample_frames(path, count)]
    replace_file(listed, json.dumps([os.path.relpath(str(one), source.pictures) for one in kept]))
    return kept


def _msvd_captions(root: Path, name: str) -> dict[str, list[str]]:
    path = root / name
    if not path.is_file() and path.with_suffix(".json").is_file():
        path = path.with_suffix(".json")
    if path.suffix == ".json":
        saved = read_json(path)
    else:
        try:
            with path.open("rb") as stream:
                saved = _Plain(stream).load()
        except Exception as error:  # pickles fail in as many ways as there are bytes
            raise DatasetError(f"{path} must be a pickled dictionary of captions ({error!r:.200}).") from error
    if not isinstance(saved, dict):
        raise DatasetError(f"{path} must be a dictionary of captions by video, got {type(saved).__name__}.")
    try:
        return {
            str(video): [caption if isinstance(caption, str) else " ".join(caption) for caption in several]
            for video, several in saved.items()
        }
    except TypeError as error:
        raise DatasetError(
            f"{path} must have lists of captions, strings or lists of words, by video ({error})."
        ) from error


class _Plain(pickle.Unpickler):
    """Reads what is made of dictionaries, lists and strings, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not read")


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise DatasetError("Videos are read with PyAV: pip install -e '.[video]'.") from error
    return av
