"""Tables 1 to 6 of U-MARVEL on nano, and a last one that combines what won there and in Magic-MM-Embedding.

    python benchmarks/reproduce/u_marvel.py --data DATASETS --out runs/reproduce                     # all rows, 3 seeds
    python benchmarks/reproduce/u_marvel.py --data DATASETS --out runs/reproduce --only T5 --seeds 1 --steps 10

Every row is a short run from ``--start``, the bundled nano, with LoRA on its language model and frozen eyes, on a part
of the collections emoji, icons and easy_vqa (for text pairs also esnli).  Mind what that start means: nano is a trained
embedder already, with causal attention and the last token, so the rows of Table 1 that change these have more to
unlearn than a language model would have.  Every training query keeps one of its positives, as in data that people
labelled, so that the filter of Table 5 has false negatives to find.

A row that is finished is not run again, a stopped one goes on.  The tables are written after every row to
``u_marvel.md`` and ``u_marvel.json`` in ``--out``; when all rows have all seeds, also to benchmarks/results/reproduce.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch

from quarterlight.data.pools import global_task
from quarterlight.data.retrieval import RetrievalDataset, with_instructions
from quarterlight.evaluation.retrieval import RetrievalEvaluator
from quarterlight.manifest import environment
from quarterlight.models.checkpoint import load_backbone, load_settings, resolve_checkpoint, save_checkpoint
from quarterlight.models.embedder import Embedder
from quarterlight.models.reranker import Reranker
from quarterlight.models.tokenizer import ANSWERS, with_words
from quarterlight.pipeline import run
from quarterlight.prompts import QUERY_INSTRUCTIONS
from quarterlight.recipe import Recipe, parse

TEXT_PAIRS = {"esnli": ("t2t",)}
CAPTIONS = [{"dataset": name, "task": "t2i"} for name in ("emoji", "icons_mdi")]
MIXTURE = [{"dataset": name, "task": task} for name, tasks in common.TASKS.items() for task in tasks]

RATE = 2.5
"""Times U-MARVEL's learning rates: so small a model, in so few steps."""

COMPRESSION_PROMPTS = {
    "text": "Summarize above sentence in one word:",
    "image": "Summarize above image in one word:",
    "both": "Summarize above image and sentence in one word:",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table.

    id: unique.  name: as it is printed.  paper: M-BEIR average, local and global pool; ``None`` where there is none.
    values: of the recipe, over those that all rows share.  base: id of a row whose stages it takes over.
    last: the stage whose model is measured.  data: how texts are changed.  instruction: whether queries have one.
    reranked: the model is measured together with the reranker of the run.
    same: id of a row of another table that is the same run.
    """

    table: str
    id: str
    name: str
    paper: tuple[float, float | None] | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    last: str = "warmup"
    data: str = "plain"
    instruction: bool = True
    reranked: bool = False
    same: str | None = None


def stage(
    arguments: argparse.Namespace, *, share: float = 1.0, rate: float = 4e-4, part: float = 1.0, **loss: Any
) -> Any:
    """A contrastive stage that sees as many samples whatever its batch.

    share: its batch, of U-MARVEL's 3,840.  rate: as U-MARVEL has it.  part: its samples, of those of a warm-up.
    """
    batch = max(4, round(arguments.batch * share))
    steps = max(1, round(part * arguments.steps * arguments.batch / batch))
    optimizer = {
        "num_steps": steps,
        "learning_rate": RATE * rate,
        "warmup_ratio": 0.03,
        "weight_decay": 0.0,
        "save_every": 50,
        "log_every": 10,
        "num_workers": 0,
    }
    values = {"batch_size": batch, "temperature": 0.05, "eval_every": 0} | loss
    if loss.get("learn_temperature"):  # U-MARVEL moves the temperature itself, at 0.05; here its logarithm is moved
        values["temperature_learning_rate"] = RATE * rate / 0.05
    return {"optimizer": optimizer, "loss": values, "lora": {"rank": 64, "alpha": 128, "dropout": 0.05}}


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """All rows, each after the one whose stages it takes over."""
    make = partial(stage, arguments)
    plain = {"warmup": make()}

    def shape(pooling: str, attention: str) -> dict[str, Any]:
        return {**plain, "model": {"pooling": pooling, "attention": attention}}

    prompted: dict[str, Any] = {"data": "prompted", "table": "T1"}
    yield Row(id="t1-cl", name="causal, last token, prompt", paper=(56.6, 54.8), values=plain, **prompted)
    for name, pooling, attention, paper in (
        ("t1-bl", "last_token", "bidirectional", (55.5, 52.6)),
        ("t1-cm", "mean", "causal", (33.7, 27.6)),
        ("t1-bm", "mean", "bidirectional", (51.7, 46.1)),
    ):
        title = f"{attention}, {pooling.replace('_', ' ')}, prompt"
        yield Row(id=name, name=title, paper=paper, values=shape(pooling, attention), **prompted)
    # The means above leave the instruction out, and so does this one; the paper's take it in, which is its Table 2.
    both = shape("mean", "bidirectional")
    yield Row(
        table="T1", id="t1-bmn", name="bidirectional, mean, no prompt", paper=(57.2, 55.2), values=both,
        same="t2-masked",
    )  # fmt: skip

    masked = {"table": "T2", "values": both}
    yield Row(id="t2-masked", name="instruction, masked in pooling", paper=(57.3, 55.5), **masked)
    yield Row(
        id="t2-open", name="instruction, not masked", paper=(57.2, 55.2), data="inside", instruction=False,
        **masked,
    )  # fmt: skip
    yield Row(id="t2-none", name="no instruction", paper=(55.3, 43.4), instruction=False, **masked)

    texts = {"text_pairs": make(share=1 / 2, rate=2e-4, part=0.5) | {"mixture": pairs(TEXT_PAIRS)}}
    captions = {"caption_pairs": make(share=2 / 3, rate=1e-4, part=0.5, backward_weight=1.0) | {"mixture": CAPTIONS}}
    yield Row(table="T3", id="t3-one", name="M-BEIR only", paper=(56.6, 53.9), values=plain)
    yield Row(table="T3", id="t3-two", name="+ NLI", paper=(57.3, 55.5), values={**texts, **plain})
    progressive = {**texts, **captions, "warmup": make(**LEARNT)}
    yield Row(table="T3", id="t3-three", name="+ NLI + CC3M", paper=(57.7, 55.8), values={**texts, **captions, **plain})

    for batch, learnt, rate, local in (
        (480, False, 1e-4, 57.2),
        (1920, False, 2e-4, 58.3),
        (3840, False, 2.8e-4, 58.5),
        (3840, False, 4e-4, 58.9),
        (7680, False, 6e-4, 58.9),
        (3840, True, 4e-4, 60.1),
        (7680, True, 4e-4, 60.3),
    ):
        kind = "learnable" if learnt else "fixed"
        share = batch / 3840
        yield Row(
            table="T4", id=f"t4-{batch}-{kind}-{rate:g}",
            name=f"{batch} ({arguments.batch * share:.0f} here), {kind}, {rate:g}",
            same="t3-one" if (batch, learnt, rate) == (3840, False, 4e-4) else None,
            paper=(local, None), values={"warmup": make(share=share, rate=rate, **(LEARNT if learnt else {}))},
        )  # fmt: skip

    # Batches of 17 queries a device there, of a quarter of a warm-up's here. The learning rate is a quarter of that
    # before, and in distillation a tenth; there it is a twenty-seventh and a fortieth, of many more steps.
    hard = partial(make, share=1 / 4, rate=1e-4, part=0.25, num_negatives=5, **{**LEARNT, **INHERITED})
    found = {"depth": 100, "window": None, "sample": 5, "pool": "global"}
    filtered = {"mine": {**found, "max_score": arguments.max_score}, "hard_negatives": hard()}
    yield Row(table="T5", id="t5-none", name="in-batch only", paper=(60.6, 58.7), values=progressive)
    for name, title, paper, stages in (
        ("t5-hard", "only top-k hard negatives", None, {"mine": found, "hard_negatives": hard(in_batch=False)}),
        ("t5-all", "in-batch + unfiltered top-k", (57.4, 55.4), {"mine": found, "hard_negatives": hard()}),
        ("t5-filtered", "in-batch + filtered top-k", (61.7, 59.9), filtered),
    ):
        values = {**progressive, **stages}
        yield Row(table="T5", id=name, name=title, paper=paper, values=values, base="t5-none", last="hard_negatives")

    reranker = {
        "optimizer": {**make(part=2.0)["optimizer"], "learning_rate": 1e-3},
        "loss": {"batch_size": 12, "listwise_weight": 0.0, "eval_every": 0, "eval_queries": 0},
        "lora": {"rank": 64, "alpha": 128},
        "initial": "finetune",
        "fusion_weight": 0.5,
    }
    taught = {
        **progressive,
        **filtered,
        "retrieve": {"depth": 20, "window": None, "sample": None},
        "rerank": reranker,
        "teach": {"depth": 12, "share": 0.1, "pool": "mixed"},
    }
    small = {"share": 1 / 12, "rate": 4e-5, "part": 0.1}
    student = make(**small, **{**LEARNT, **INHERITED})
    control = make(**small, num_negatives=11, in_batch=False, **{**LEARNT, **INHERITED})
    yield Row(
        table="T6", id="t6-teacher", name="recall + reranker (teacher)", paper=(64.5, 61.7), values=taught,
        base="t5-filtered", last="teach", reranked=True,
    )  # fmt: skip
    yield Row(
        table="T6", id="t6-distill", name="distillation", paper=(63.2, 60.7), values={**taught, "distill": student},
        base="t6-teacher", last="distill",
    )  # fmt: skip
    yield Row(
        table="T6", id="t6-hard", name="continue-hard", paper=(62.2, 60.0), values={**taught, "continue_hard": control},
        base="t6-teacher", last="continue_hard",
    )  # fmt: skip

    judged = {
        "retrieve": {"depth": 20, "window": None, "sample": None},
        "judge": {"backend": "labels", "truth": str(arguments.out / "data" / "truth")},
        "finetune": hard(),
    }
    best = {**progressive, **judged}
    plainly = {**plain, "model": {"visual_token_compression": 1}}
    yield Row(table="T7", id="t7-s1", name="in-batch, fixed temperature, no compression", values=plainly)
    yield Row(table="T7", id="t7-plain", name="+ compression", values=plain, same="t3-one")
    yield Row(
        table="T7", id="t7-learnt", name="+ learnable temperature", values={"warmup": make(**LEARNT)},
        same="t4-3840-learnable-0.0004",
    )  # fmt: skip
    yield Row(table="T7", id="t7-progressive", name="+ progressive transition", values=progressive, same="t5-none")
    yield Row(table="T7", id="t7-judged", name="+ judged negatives", values=best, base="t5-none", last="finetune")
    yield Row(
        table="T7", id="t7-best", name="+ distillation", last="distill", base="t7-judged",
        values={**best, "rerank": reranker, "teach": taught["teach"], "distill": student},
    )  # fmt: skip


LEARNT = {"learn_temperature": True}

INHERITED = {"inherit_temperature": True}

CLAIMS = [
    ("t1-bmn", "t1-bm"),
    ("t1-cl", "t1-bl"),
    ("t1-cl", "t1-cm"),
    ("t1-bmn", "t1-cl"),
    ("t2-masked", "t2-open"),
    ("t2-masked", "t2-none"),
    ("t3-two", "t3-one"),
    ("t3-three", "t3-two"),
    ("t4-3840-fixed-0.0004", "t4-480-fixed-0.0001"),
    ("t4-3840-learnable-0.0004", "t4-3840-fixed-0.0004"),
    ("t4-7680-learnable-0.0004", "t4-3840-learnable-0.0004"),
    ("t5-none", "t5-hard"),
    ("t5-none", "t5-all"),
    ("t5-filtered", "t5-none"),
    ("t6-distill", "t6-hard"),
    ("t6-hard", "t5-filtered"),
    ("t6-teacher", "t6-distill"),
]
"""What the paper's tables say: the first row is better than the second, in the local pool."""

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}
"""Seeds -> how many standard errors a mean difference is away from none, to be so by chance in a case of twenty."""

Scores = dict[str, float]


def pairs(tasks: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Entries of a mixture."""
    return [{"dataset": name, "task": task} for name, some in tasks.items() for task in some]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with emoji, icons_mdi, easy_vqa, esnli")
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs; stopped ones are resumed")
    parser.add_argument("--start", default="nano", help="model that all rows begin with; default: nano")
    parser.add_argument("--seeds", type=int, default=3, help="default: 3")
    parser.add_argument("--batch", type=int, default=96, help="queries, in place of U-MARVEL's 3,840; default: 96")
    parser.add_argument("--steps", type=int, default=40, help="of such a batch, in a warm-up; default: 40")
    parser.add_argument("--queries", type=int, default=600, help="of each training task; default: 600")
    parser.add_argument("--max-score", type=float, default=0.7, help="of the filter of Table 5; default: 0.7")
    parser.add_argument("--only", nargs="*", default=[], help="tables (T1) or rows (t1-cl); those they need run too")
    arguments = parser.parse_args()
    claim(arguments)
    data = {name: prepared(arguments, name) for name in REWRITES}
    prepared(arguments, "truth")
    arguments.start = started(arguments)
    table = list(rows(arguments))
    wanted = [row for row in table if not arguments.only or {row.table, row.id} & {*arguments.only}]
    by_id = {row.id: row for row in table}
    scores: dict[str, list[dict[str, Any]]] = {}
    for seed in range(arguments.seeds):
        for row in wanted:
            one = measured(arguments, row, seed, by_id, data)
            scores.setdefault(row.id, []).append(one)
            print(f"{row.id}, seed {seed}: local {one['local']['mean']:.3f}, global {one['global']['mean']:.3f}")
            write(arguments, table, scores, untrained(arguments, data["plain"]))


def claim(arguments: argparse.Namespace) -> None:
    """Refuses a folder that was begun with other data or another model, which are prepared in it once."""
    made = {
        "data": str(arguments.data.resolve()),
        "queries": arguments.queries,
        "start": Embedder(arguments.start).model_hash,
    }
    file = arguments.out / "options.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.write_text(json.dumps(made, indent=1))
    elif (before := json.loads(file.read_text())) != made:
        raise SystemExit(f"{arguments.out} was begun with {before}, not {made}: choose another --out.")


def measured(
    arguments: argparse.Namespace, row: Row, seed: int, by_id: Mapping[str, Row], data: Mapping[str, Path]
) -> dict[str, Any]:
    """The scores of a row, run and measured if that has not been done."""
    if row.same is not None:
        return measured(arguments, by_id[row.same], seed, by_id, data)
    folder = arguments.out / "u_marvel" / f"{row.id}-seed{seed}"
    file = folder / "scores.json"
    recipe = recipe_of(arguments, row, seed)
    settings = json.loads(json.dumps([recipe_values(arguments, row, seed), arguments.queries]))
    if file.is_file():
        kept: dict[str, Any] = json.loads(file.read_text())
        if kept["settings"] == settings:
            return kept
        raise SystemExit(f"{folder} was run with other options: remove it, or choose another --out.")
    started = time.monotonic()
    done: list[str] = []
    if row.base is not None:
        before = by_id[row.base]
        measured(arguments, before, seed, by_id, data)
        base = recipe_of(arguments, before, seed)
        done = [one for one in recipe.stages if one in base.stages[: base.stages.index(before.last) + 1]]
        common.begin(arguments.out / "u_marvel" / f"{row.base}-seed{seed}", done, folder)
    started = time.monotonic()
    run(recipe, data[row.data], folder, first=recipe.stages[len(done)], last=row.last, report=print)
    trained = time.monotonic() - started
    found = score(folder, recipe, row, data[row.data])
    seconds = {"train": round(trained, 1), "evaluate": round(time.monotonic() - started - trained, 1)}
    record = {**found, "seconds": seconds, "settings": settings}
    file.write_text(json.dumps(record, indent=1))
    return record


def started(arguments: argparse.Namespace) -> str:
    """The model that all rows begin with, whose tokenizer has the answers of a reranker as tokens.

    One that lacks them gets them, or it could be no teacher.  Their rows are drawn at random and stay so: it is the
    adapters of the language model that learn to answer along them.
    """
    folder = arguments.out / "start"
    if not folder.exists():
        source = resolve_checkpoint(arguments.start)
        model, processor = load_backbone(source)
        tokenizer = processor.tokenizer
        tokenizer._tokenizer = with_words(tokenizer.backend_tokenizer, ANSWERS)  # which no public method replaces
        torch.manual_seed(0)
        if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
        save_checkpoint(folder, model, processor, load_settings(source))
    return str(folder)


def recipe_values(arguments: argparse.Namespace, row: Row, seed: int) -> dict[str, Any]:
    """The recipe of a row, up to the stage that it measures."""
    mixture = [one | ({} if row.instruction else {"instruction": ""}) for one in MIXTURE]
    shared: dict[str, Any] = {"name": row.id, "seed": seed, "mixture": mixture, "validation": None}
    values = {**shared, **row.values}
    model = {"checkpoint": arguments.start, "text_max_tokens": 64, "attn_implementation": "eager"}
    return {**values, "model": {**model, **values.get("model", {})}}


def recipe_of(arguments: argparse.Namespace, row: Row, seed: int) -> Recipe:
    return parse(Recipe, recipe_values(arguments, row, seed), where=row.id)


def score(folder: Path, recipe: Recipe, row: Row, data: Path) -> dict[str, Scores]:
    """The scores of the model that a row has trained."""
    last = [one for one in recipe.embedders if recipe.stages.index(one) <= recipe.stages.index(row.last)][-1]
    prepare = with_instructions if row.instruction else partial(with_instructions, query="")
    more: dict[str, Any] = {}
    if row.reranked:
        more = {"reranker": Reranker(folder / "rerank"), "rerank": 10}
    return precision(RetrievalEvaluator(Embedder(folder / last), prepare=prepare, group_by=(), **more), data)


def untrained(arguments: argparse.Namespace, data: Path) -> dict[str, Scores]:
    """The scores of the model that all rows begin with; kept beside it."""
    file = arguments.out / "start.json"
    if not file.is_file():
        found = precision(RetrievalEvaluator(Embedder(arguments.start), group_by=()), data)
        file.write_text(json.dumps(found, indent=1))
    kept: dict[str, Scores] = json.loads(file.read_text())
    return kept


def precision(evaluator: RetrievalEvaluator, data: Path) -> dict[str, Scores]:
    """P@1 of each test task, and their mean, in the pool of the task and in that of all tasks."""
    tasks = [RetrievalDataset(data / one["dataset"]).load(one["task"], "test") for one in MIXTURE]
    found: dict[str, Scores] = {}
    for kind, some in {"local": tasks, "global": [global_task(one, tasks) for one in tasks]}.items():
        values: Scores = {}
        for task in some:
            result = evaluator.evaluate(task)
            best = result.reranked if result.reranked is not None else result.scores
            values[f"{task.dataset}/{task.task}"] = best.metrics["precision@1"]
        found[kind] = {**values, "mean": statistics.mean(values.values())}
    return found


Rewrite = Callable[[dict[str, Any], str], dict[str, Any]]


def _prompted(row: dict[str, Any], task: str) -> dict[str, Any]:
    """With U-MARVEL's compression prompt after the text."""
    for text, picture in (("query_txt", "query_img_path"), ("txt", "img_path")):
        if text in row:
            kind = "both" if row[text] and row[picture] else "text" if row[text] else "image"
            row[text] = f"{row[text] or ''}\n{COMPRESSION_PROMPTS[kind]}".strip()
    return row


def _inside(row: dict[str, Any], task: str) -> dict[str, Any]:
    """With the instruction as a part of the query's text, so that nothing tells it apart in pooling."""
    if "query_txt" in row:
        row["query_txt"] = f"{QUERY_INSTRUCTIONS[task]} {row['query_txt'] or ''}".strip()
    return row


REWRITES: dict[str, Rewrite] = {"plain": lambda row, task: row, "prompted": _prompted, "inside": _inside}


def prepared(arguments: argparse.Namespace, kind: str) -> Path:
    """A part of the datasets, with texts rewritten; ``truth`` is the plain one with all positives of its queries."""
    root = arguments.out / "data" / kind
    for name, tasks in {**common.TASKS, **TEXT_PAIRS}.items():
        target = root / name
        if target.exists():
            continue
        draft = root / f".{name}"
        shutil.rmtree(draft, ignore_errors=True)
        for part in ("queries", "pools"):
            (draft / part).mkdir(parents=True)
        if (images := arguments.data / name / "images.zip").is_file():
            (draft / "images.zip").symlink_to(images.resolve())
        for task in tasks:
            for split, limit in {"train": arguments.queries, "test": arguments.queries // 4}.items():
                if (name, split) == ("esnli", "test"):
                    continue
                _part(arguments.data / name, draft, task, split, limit, kind)
        draft.replace(target)
    return root


def _part(source: Path, target: Path, task: str, split: str, limit: int, kind: str) -> None:
    """So many queries of a task, and a pool of what they name and as many others; training keeps one positive each."""
    file = f"{task}.{split}.jsonl.gz"
    queries, pool = (_read(source / part / file) for part in ("queries", "pools"))
    if (source.name, task, split) == ("emoji", "t2i", "train"):
        queries = [row for row in queries if row.get("lang") == "en"]
    draw = random.Random(f"{source.name} {file}")
    queries = draw.sample(queries, min(limit, len(queries)))
    named = {did for row in queries for did in (*row["pos_cand_list"], *(row.get("neg_cand_list") or ()))}
    others = [row["did"] for row in pool if row["did"] not in named]
    kept = named.union(draw.sample(others, min(2 * limit, len(others))))
    if split == "train" and kind != "truth":
        queries = [row | {"pos_cand_list": row["pos_cand_list"][:1]} for row in queries]
    rewrite = REWRITES.get(kind, REWRITES["plain"])
    _write(target / "queries" / file, [rewrite(row, task) for row in queries])
    _write(target / "pools" / file, [rewrite(row, task) for row in pool if row["did"] in kept])


def _read(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _write(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    with gzip.open(file, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in lines)


TITLES = {
    "T1": "Table 1: pooling, attention and compression prompt",
    "T2": "Table 2: the instruction in pooling",
    "T3": "Table 3: progressive transition",
    "T4": "Table 4: batch, temperature, learning rate",
    "T5": "Table 5: hard negatives",
    "T6": "Table 6: distillation",
    "T7": "What won in both papers, together",
}


def write(
    arguments: argparse.Namespace,
    table: Sequence[Row],
    scores: Mapping[str, list[dict[str, Any]]],
    start: Mapping[str, Scores],
) -> None:
    """The tables so far."""
    lines = [
        f"Mean P@1 of {len(MIXTURE)} test tasks, mean and standard deviation over seeds; of the paper, the average of "
        "M-BEIR. Every row starts from nano, which is a causal embedder by the last token already: "
        f"{start['local']['mean']:.3f} local, {start['global']['mean']:.3f} global.",
        "",
    ]
    for number, title in TITLES.items():
        shown = [row for row in table if row.table == number and row.id in scores]
        if not shown:
            continue
        lines += [f"## {title}", "", "| row | seeds | local | global | paper, local | paper, global | s |"]
        lines.append("| --- | --- | --- | --- | --- | --- | --- |")
        for row in shown:
            some = scores[row.id]
            cells = [common.spread([one[kind]["mean"] for one in some]) for kind in ("local", "global")]
            paper = ["-" if value is None else str(value) for value in row.paper or (None, None)]
            seconds = statistics.mean(sum(one["seconds"].values()) for one in some)
            lines.append(f"| {row.name} | {len(some)} | {' | '.join(cells)} | {' | '.join(paper)} | {seconds:.0f} |")
        lines.append("")
        names = {row.id: row.name for row in table}
        for better, worse in CLAIMS:
            if by_table(table, better) == number and better in scores and worse in scores:
                lines.append(f"- {names[better]} above {names[worse]}: {verdict(scores[better], scores[worse])}")
        lines.append("")
    record = {
        "batch": arguments.batch,
        "steps": arguments.steps,
        "queries": arguments.queries,
        "max_score": arguments.max_score,
        "start": start,
        "rows": {
            row.id: {"name": row.name, "paper": row.paper, "seeds": [_told(one) for one in scores.get(row.id, [])]}
            for row in table
        },
    }
    (arguments.out / "u_marvel.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    (arguments.out / "u_marvel.json").write_text(json.dumps(record | environment(), indent=1) + "\n", encoding="utf-8")
    if all(len(scores.get(row.id, ())) == arguments.seeds for row in table):
        common.finish("u_marvel", "\n".join(lines), record, partial(_draw, table, scores))


def _told(one: Mapping[str, Any]) -> dict[str, Any]:
    """Scores and seconds of a run, without its recipe, whose folders are of one machine."""
    return {name: value for name, value in one.items() if name != "settings"}


def by_table(table: Sequence[Row], name: str) -> str:
    """The table that a row is in."""
    return next(row.table for row in table if row.id == name)


def verdict(better: Sequence[dict[str, Any]], worse: Sequence[dict[str, Any]]) -> str:
    """Whether nano agrees with the paper, by the differences of the seeds."""
    apart = [one["local"]["mean"] - other["local"]["mean"] for one, other in zip(better, worse, strict=False)]
    mean = statistics.mean(apart)
    error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else 0.0
    word = "agrees" if mean > 0 else "disagrees"
    if len(apart) == 1:
        return f"{word} ({mean:+.3f}; a single seed, whose noise is not known)"
    sure = "" if abs(mean) > STUDENT.get(len(apart), 2.0) * error else ", within the noise of the seeds"
    return f"{word} ({mean:+.3f}{sure})"


def _draw(table: Sequence[Row], scores: Mapping[str, list[dict[str, Any]]], axes: Any) -> None:
    shown = [row for row in table if row.paper is not None]
    local = [statistics.mean(one["local"]["mean"] for one in scores[row.id]) for row in shown]
    for number in TITLES:
        some = [place for place, row in enumerate(shown) if row.table == number]
        if some:
            axes.plot([shown[place].paper[0] for place in some], [local[place] for place in some], "o", label=number)
    axes.set(xlabel="M-BEIR average of the paper, local", ylabel="mean P@1 of nano, local", title="U-MARVEL on nano")
    axes.legend()


if __name__ == "__main__":
    main()
