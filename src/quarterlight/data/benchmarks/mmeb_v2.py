"""The image tasks of MMEB-V2, which current leaderboards run: the queries and candidates of MMEB, instructions apart.

    <config>/test-*.parquet     of ziyjiang/MMEB_Test_Instruct: qry_inst, qry_text, qry_img_path, tgt_inst (strings),
                                tgt_text, tgt_img_path (lists of strings)
    image-tasks/<set>/...       the pictures, of image-tasks/mmeb_v1.tar.gz in TIGER-Lab/MMEB-V2, unpacked; as
                                MMEB/<set>/... too, as the archive has them

The official parser puts a mark of a picture into the queries of WebQA and EDIS, which show none, and takes candidates
for the same that share a picture but differ in text.  Neither is repeated here.
"""

from __future__ import annotations

from pathlib import Path

from quarterlight.data.benchmarks.builder import without_tokens
from quarterlight.data.benchmarks.gallery import Gallery
from quarterlight.data.benchmarks.mmeb import choices, unquoted
from quarterlight.data.benchmarks.source import Source
from quarterlight.data.retrieval import RetrievalTask

COLUMNS = ("qry_inst", "qry_text", "qry_img_path", "tgt_inst", "tgt_text", "tgt_img_path")


def load(source: Source) -> RetrievalTask:
    """One config as a task.  Options: ``config``, without it, the name of the dataset; ``unpacked``, a folder of the
    archive's files.  Raises as MMEB's loader."""
    folder = source.folder
    unpacked = [Path(one) for one in (source.options.get("unpacked"),) if one]
    places = [folder / "image-tasks", folder / "image-tasks" / "MMEB", folder / "MMEB", folder / "images"]
    places += [one / part for one in unpacked for part in (".", "MMEB", "image-tasks")] + [folder]
    return choices(
        source,
        source.option("config", source.dataset),
        gallery=Gallery(places, [folder / "images.zip"]),
        columns=COLUMNS,
        query_text=lambda text: unquoted(without_tokens(text)),
        target_text=lambda text: unquoted(without_tokens(text)),
    )
