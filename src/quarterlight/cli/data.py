"""``quarterlight data convert`` and ``quarterlight data check``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from quarterlight.cli import console
from quarterlight.data import checking, conversion
from quarterlight.data.corpora import CORPORA
from quarterlight.data.corpora.example import Corpus
from quarterlight.data.corpora.folder import write_folder
from quarterlight.data.packing import Tokenize
from quarterlight.errors import InputError

_PROBLEM_LINES = 20


def convert(
    source: Annotated[Path, typer.Argument(help="File or folder to convert: .json, .jsonl, either with .gz, ...")],
    layout: Annotated[
        str,
        typer.Option(
            "--from",
            help=f"Its layout: {', '.join(conversion.LAYOUTS)}; to retrieval: {', '.join(CORPORA)}.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="File of conversations to write, *.jsonl; or folder, to retrieval.")],
    to: Annotated[str, typer.Option(help="What to make: conversations or retrieval.")] = "conversations",
    task: Annotated[str | None, typer.Option(help="Direction of the rows, such as it2i; to retrieval.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Of the layout, to retrieval: config=CIRR, set=cirr, pages=4, ...")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder that pictures are named relative to.", show_default="that of the input")
    ] = None,
    dedupe: Annotated[
        bool, typer.Option(help="Leave out what says the same about the same pictures as a row before.")
    ] = True,
    question: Annotated[
        str | None, typer.Option(help="What is asked of a class label, or of a picture without a question.")
    ] = None,
    boxes: Annotated[str, typer.Option(help="Boxes of grounding in pixels: xyxy (corners) or xywh (COCO).")] = "xyxy",
    split: Annotated[str, typer.Option(help="Of a retrieval dataset.")] = "train",
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as one line of JSON.")] = False,
) -> None:
    """Turn instruction data, captions, boxes or class labels into conversations for stage 1; or the training sets of
    the later stages into a retrieval dataset, with --to retrieval.

    Pictures stay where they are, so write the file where they lie: in their folder, or beside their folder images/ or
    their images.zip.  Rows that cannot be converted are left out, counted and listed.

    \b
    quarterlight data convert llava_v1_5_mix665k.json --from llava --out llava/mix.jsonl --images llava
    quarterlight data convert refcoco.jsonl --from grounding --boxes xywh --out coco/refcoco.jsonl --images coco
    quarterlight data convert imagenet/train --from labels --out imagenet/train/labels.jsonl
    quarterlight data convert data/emoji --from retrieval --out data/emoji/conversations.jsonl
    quarterlight data convert MMEB-train/CIRR --from mmeb_train --to retrieval --task it2i --out data/mmeb_cirr
    quarterlight data convert M-BEIR --from mbeir --to retrieval --task it2i --option set=cirr --option task=7 \\
        --out data/mbeir_cirr
    """
    if to == "retrieval":
        if task is None:
            raise InputError("--to retrieval needs a --task: the direction of the rows, such as it2i.")
        corpus = Corpus(path=source, task=task, split=split, images=images, options=_options(option or []))
        _to_folder(corpus, layout, out, as_json)
        return
    if to != "conversations":
        raise InputError(f"--to is conversations or retrieval, got {to!r}.")
    if task is not None or option:
        raise InputError("--task and --option are for --to retrieval.")
    if boxes not in ("xyxy", "xywh"):
        raise InputError(f"--boxes is xyxy or xywh, got {boxes!r}.")
    settings = conversion.Layout(name=layout, question=question, boxes=boxes, split=split)  # type: ignore[arg-type]
    with console.progress("rows", quiet=as_json) as bar:
        line = bar.add_task("Converting", total=None)
        counts = conversion.convert(
            source, settings, out, images=images, dedupe=dedupe, on_row=lambda: bar.advance(line)
        )
    _print_problems(counts.problems)
    if as_json:
        console.print_json({"out": str(out), **asdict(counts)})
        return
    console.err.print(
        f"{out}: {counts.written:,} conversations of {counts.read:,} rows; {counts.duplicates:,} duplicates and "
        f"{len(counts.problems):,} rows with problems left out, {counts.mended:,} mended.",
        markup=False,
    )


def _options(given: list[str]) -> dict[str, str]:
    for one in given:
        if "=" not in one:
            raise InputError(f"--option is written name=value, got {one!r}.")
    return dict(one.split("=", 1) for one in given)


def _to_folder(corpus: Corpus, layout: str, out: Path, as_json: bool) -> None:
    with console.progress("rows", quiet=as_json) as bar:
        line = bar.add_task("Converting", total=None)
        counts = write_folder(corpus, layout, out, on_row=lambda: bar.advance(line))
    _print_problems(counts.problems)
    if as_json:
        console.print_json({"out": str(out), **asdict(counts)})
        return
    console.err.print(
        f"{out}: {counts.queries:,} queries and {counts.candidates:,} candidates of {counts.read:,} rows; "
        f"{counts.other:,} of another direction and {len(counts.problems):,} with problems left out.",
        markup=False,
    )


def check(
    path: Annotated[Path, typer.Argument(help="File of conversations, retrieval dataset, or a folder of them.")],
    model: Annotated[
        str | None, typer.Option(help="Count tokens as this model reads them: bundled name, folder or hub id.")
    ] = None,
    max_tiles: Annotated[int, typer.Option(min=1, help="The most tiles of a picture, for --model.")] = 4,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every picture, not only its header.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is found as one line of JSON.")] = False,
) -> None:
    """List what is wrong with training data: rows that break their format, repeated ids, missing pictures.

    Exit code 1 if there is any problem.  Of each task of a retrieval dataset, the first row that breaks its format is
    named.

    \b
    quarterlight data check data/llava/mix.jsonl --model OpenGVLab/InternVL3-2B-hf
    quarterlight data check data/emoji --decode
    """
    tokenize = None if model is None else _tokenizer(model, max_tiles)
    with console.progress("rows", quiet=as_json) as bar:
        line = bar.add_task("Checking", total=None)
        found = list(checking.check(path, tokenize=tokenize, decode=decode, on_row=lambda: bar.advance(line)))
    problems = [problem for one in found for problem in one.problems]
    if as_json:
        console.print_json([vars(one) for one in found])
    else:
        table = console.table("data", "what", "count", right=("count",))
        for one in found:
            for number, (kind, count) in enumerate(one.counts.items()):
                table.add_row(one.name if number == 0 else "", kind, f"{count:,}")
        console.out.print(table)
        _print_problems(problems)
        console.err.print("No problems." if not problems else f"Problems: {len(problems):,}.")
    if problems:
        raise typer.Exit(1)


def _tokenizer(model: str, max_tiles: int) -> Tokenize:
    from quarterlight.models.checkpoint import resolve_checkpoint  # seconds of import
    from quarterlight.models.internvl_vtc.processing import InternVLVTCProcessor
    from quarterlight.training.restore import ConversationTokenizer

    return ConversationTokenizer(InternVLVTCProcessor.from_pretrained(resolve_checkpoint(model)), max_tiles)


def _print_problems(problems: list[str]) -> None:
    for problem in problems[:_PROBLEM_LINES]:
        console.err.print(problem, style="yellow", markup=False)
    if len(problems) > _PROBLEM_LINES:
        console.err.print(f"... and {len(problems) - _PROBLEM_LINES:,} more (--json has all)", style="dim")
