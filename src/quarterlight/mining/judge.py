"""Asks a judge about every retrieved pair, keeps what it says as it comes, and tells relevant from hard negative.

Stage 3 of Magic-MM-Embedding (section 3.3): what the model of stage 2 retrieves first for a query is shown to a large
model; where logit(yes) > logit(no) the candidate is relevant after all, where logit(no) > logit(yes) it is a hard
negative, and what is neither is used as neither.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from quarterlight.data.retrieval import RetrievalDataset, RetrievalTask
from quarterlight.errors import DatasetError, JudgeError, RecipeError, check_least, check_share, did_you_mean
from quarterlight.mining.judge_report import EXAMPLES, Example, JudgeCounts, JudgedTask, write_judge_report
from quarterlight.mining.judges import Judge, Pair, Verdict
from quarterlight.mining.judges.labels import LabelJudge
from quarterlight.mining.negatives import mined_file, read_mined
from quarterlight.mining.parts import write_table
from quarterlight.records import Query

BACKENDS = ("labels", "transformers", "endpoint")

EXEMPT = "exempt"
"""Judge of the pairs of tasks that no one is asked about."""

# not given in the paper, which has one for each of its datasets: that of one of the same direction, if there is one
_BY_DIRECTION = {
    "t2t": "Determine whether the given query text is relevant to the given text.",
    "t2i": "Determine whether the given query text is relevant to the given image.",
    "t2it": "Determine whether the query text is relevant to the given image-text mixed content.",
    "t2vd": "Determine whether the given query text is relevant to the given visual document image.",
    "i2t": "Determine whether the given text can serve as a caption for the given image.",
    "i2i": "Determine whether the two given images are similar.",
    "it2t": "Given a reference image and a question, determine whether the provided answer is correct.",
    "it2i": (
        "Given a text instruction, a reference image, and a target image, determine whether the reference image "
        "transformed by the text instruction is relevant to the target image."
    ),
    "it2it": "Given an image with text, determine whether it is relevant to the given image-text mixed content.",
}
_ANY_DIRECTION = "Determine whether the given target is relevant to the given query."

_SCHEMA = pa.schema(
    [
        ("qid", pa.string()),
        ("did", pa.string()),
        ("yes_logit", pa.float64()),
        ("no_logit", pa.float64()),
        ("relevant", pa.bool_()),
        ("judge", pa.string()),
    ]
)
_ASKED = b"quarterlight.judge"  # key of the file's metadata: who was asked what

_Ids: TypeAlias = tuple[str, str]  # qid, did
_Answer: TypeAlias = tuple[float, float, str]  # logits of yes and no, judge

_FAILURES_IN_A_ROW = 64
_REASON_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class JudgeRecipe:
    """Who judges, and how it is asked."""

    backend: str
    """``labels`` (of the data), ``transformers`` (a model here) or ``endpoint`` (a server that speaks OpenAI's chat)"""
    model: str | None = None
    """of ``transformers``: folder or hub id; of ``endpoint``: the name that the server knows it by"""
    url: str | None = None
    """of ``endpoint``, such as http://localhost:8000/v1; its key, if it wants one, is that of OPENAI_API_KEY"""
    concurrency: int = 32
    """of ``endpoint``: requests that are always under way"""
    timeout_s: float = 120.0
    """of ``endpoint``: seconds after which a request counts as failed"""
    retries: int = 5
    """of ``endpoint``: how often a request that failed is sent again, after waits that double from half a second"""
    tokens_per_batch: int = 16_384
    """of ``transformers``: visual and text tokens, padding included, that go through the model at once"""
    max_pixels: int = 1_048_576
    """width times height to which larger pictures are scaled down before they are shown"""
    instructions: Mapping[str, str] = field(default_factory=dict)
    """dataset/task -> judgment instruction; for others that of the paper's Table 13, or one for their direction"""
    exempt: Sequence[str] = ()
    """dataset/task whose retrieved candidates all count as irrelevant unasked, as the paper does for HatefulMemes"""
    same: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """of ``labels``: dataset/task -> fields; queries that agree in them ask the same (see LabelJudge)"""
    incomplete: Sequence[str] = ()
    """of ``labels``: dataset/task of which only a part of the pool was labelled, so that the rest is undecided"""
    truth: str | None = None
    """of ``labels``: directory of the datasets with all their labels, where those that are trained on hide some"""
    max_failed: float = 0.01
    """share of pairs without an answer above which the stage is not finished; they are asked again when it goes on"""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise RecipeError(f"There is no judge {self.backend!r}. {did_you_mean(self.backend, BACKENDS)}")
        needed = {"labels": (), "transformers": ("model",), "endpoint": ("model", "url")}[self.backend]
        for name in needed:
            if not getattr(self, name):
                raise RecipeError(f"A judge of the kind {self.backend!r} needs {name}.")
        others = {"model", "url"}.difference(needed)
        for name in sorted(others if self.backend == "labels" else {*others, "same", "incomplete", "truth"}):
            if getattr(self, name):
                raise RecipeError(f"A judge of the kind {self.backend!r} has no use for {name}: leave it out.")
        check_least(self, concurrency=1, retries=0, tokens_per_batch=1, max_pixels=1)
        check_share(self, "max_failed")
        if self.timeout_s <= 0:
            raise RecipeError(f"timeout_s must be above 0, got {self.timeout_s}.")


def judge(
    tasks: Sequence[RetrievalTask],
    retrieved: Path,
    folder: Path,
    recipe: JudgeRecipe,
    *,
    by: Judge | None = None,
    api_key: str | None = None,
    show_progress: bool = False,
) -> dict[str, JudgeCounts]:
    """Judges what was retrieved for the queries of each task; returns counts by ``dataset/task``.

    retrieved: holds ``<dataset>.<task>.parquet`` with qid, did and rank.  Known positives in it are passed over.
    folder: gets ``<dataset>.<task>.parquet`` with qid, did, yes_logit, no_logit, relevant (null: undecided) and judge,
        in the order of retrieval, then ``report.html`` and ``report.json``.  Each verdict is first written to
        ``<dataset>.<task>.jsonl`` as it comes, so that a stopped run goes on where it was; pairs without an answer are
        asked again then.
    by: a judge in place of that of the recipe.  api_key: for the recipe's server, if it wants one.
    Raises DatasetError for retrieved ids that the task does not have, JudgeError when the judge does not answer, when
    more pairs than ``max_failed`` have no answer, when nothing can be written, or when the folder holds the verdicts of
    another judge.  What was judged is kept.
    """
    if by is None:
        by = _judge_of(recipe, tasks, api_key)
    work = [_Work(task, retrieved, folder, recipe, by) for task in tasks]
    failures = _Failures(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tqdm(
            total=sum(one.num_rows for one in work), desc="Judging", unit="pair", disable=not show_progress
        ) as bar:
            done = [one.run(failures, bar) for one in work]
        write_judge_report(folder, by.name, done)
    except OSError as error:
        raise JudgeError(
            f"Verdicts cannot be written: {error.strerror or error} ({error.filename or folder}). Those before are "
            f"kept in {folder}: mend it and start the same command again."
        ) from error
    failed, total = (sum(getattr(one.counts, name) for one in done) for name in ("failed", "pairs"))
    if failed > recipe.max_failed * total:
        raise JudgeError(
            f"{failed:,} of {total:,} pairs have no answer, more than max_failed = {recipe.max_failed:g} allows; the "
            f"last: {failures.last}. The other verdicts are kept in {folder}: start the same command again, and only "
            "these are asked about."
        )
    return {one.name: one.counts for one in done}


def read_judged(folder: Path, task: RetrievalTask) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """What was judged irrelevant, and what relevant: (negatives, also_relevant), each qid -> dids as they were ranked.

    Raises DatasetError when the task was not judged.
    """
    table = _read(mined_file(folder, task))
    irrelevant: dict[str, list[str]] = {}
    relevant: dict[str, list[str]] = {}
    for qid, did, verdict in zip(*(table[name].to_pylist() for name in ("qid", "did", "relevant")), strict=True):
        if verdict is not None:
            (relevant if verdict else irrelevant).setdefault(qid, []).append(did)
    return irrelevant, relevant


def judgment_instruction(name: str, instructions: Mapping[str, str]) -> str | None:
    """What the judge is told for ``dataset/task``: as given, else as in Table 13, else by direction.

    ``None`` for a dataset that the paper does not judge.

    >>> judgment_instruction("mmeb_nights/i2i", {})
    'Determine whether the two given images are similar.'
    >>> judgment_instruction("HatefulMemes/i2t", {}) is None
    True
    """
    if name in instructions:
        return instructions[name]
    dataset, _, task = name.rpartition("/")
    known = _of_the_paper()
    if (_plain(dataset), task) in known:
        return known[_plain(dataset), task] or None
    return _BY_DIRECTION.get(task, _ANY_DIRECTION)


@cache
def _of_the_paper() -> dict[tuple[str, str], str]:
    text = (files("quarterlight.mining") / "resources" / "judge_instructions.csv").read_text(encoding="utf-8")
    return {(_plain(row["dataset"]), row["task"]): row["instruction"] for row in csv.DictReader(text.splitlines())}


def _plain(dataset: str) -> str:
    """The name without what spellings differ in, and without that of the collection."""
    return re.sub(r"[^a-z0-9]", "", dataset.lower()).removeprefix("mmeb")


def _judge_of(recipe: JudgeRecipe, tasks: Sequence[RetrievalTask], api_key: str | None) -> Judge:
    if recipe.backend == "labels":
        if recipe.truth is not None:
            truth = Path(recipe.truth)
            tasks = [RetrievalDataset(truth / task.dataset).load(task.task, task.split) for task in tasks]
        return LabelJudge(tasks, same=recipe.same, incomplete=recipe.incomplete)
    assert recipe.model is not None
    if recipe.backend == "transformers":
        from quarterlight.mining.judges.local import TransformersJudge

        return TransformersJudge(recipe.model, tokens_per_batch=recipe.tokens_per_batch, max_pixels=recipe.max_pixels)
    assert recipe.url is not None
    from quarterlight.mining.judges.endpoint import EndpointJudge

    return EndpointJudge(
        recipe.url,
        recipe.model,
        api_key=api_key,
        concurrency=recipe.concurrency,
        timeout_s=recipe.timeout_s,
        retries=recipe.retries,
        max_pixels=recipe.max_pixels,
    )


class _Failures:
    """Stops a run in which nothing succeeds any more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last = ""
        self.in_a_row = 0

    def see(self, verdict: Verdict) -> None:
        """Raises JudgeError at the last of too many failures in a row."""
        if not verdict.failed:
            self.in_a_row = 0
            return
        self.last = f"{verdict.qid} with {verdict.did}: {verdict.failed}"
        self.in_a_row += 1
        if self.in_a_row == _FAILURES_IN_A_ROW:
            raise JudgeError(
                f"The judge gave no answer {self.in_a_row} times in a row; the last: {self.last}. The verdicts before "
                f"are kept in {self.folder}: mend it and start the same command again."
            )


class _Work:
    """One task: what was retrieved for it, what is known of that already, and the file that comes of it."""

    def __init__(self, task: RetrievalTask, retrieved: Path, folder: Path, recipe: JudgeRecipe, by: Judge) -> None:
        self.name = f"{task.dataset}/{task.task}"
        self.task = task
        self.by = by
        self.retrieved = retrieved
        self.file = mined_file(folder, task)
        instruction = judgment_instruction(self.name, recipe.instructions)
        self.exempt = self.name in recipe.exempt or instruction is None
        self.instruction = instruction or ""
        self.asked = {"judge": EXEMPT if self.exempt else by.name, "instruction": self.instruction}
        try:
            self.num_rows = pq.read_metadata(mined_file(retrieved, task)).num_rows
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(
                f"{mined_file(retrieved, task)}, what was retrieved for {task.label}, cannot be read ({error})."
            ) from error

    def run(self, failures: _Failures, bar: Any) -> JudgedTask:
        """Asks about the pairs that have no answer yet, and writes the file."""
        found = self._found()
        answers, failed = self._known()
        reasons: Counter[str] = Counter()
        with _Journal(self.file.with_suffix(".jsonl"), self.asked) as journal:
            answers |= journal.answers
            failed = (failed | journal.failed) - answers.keys()
            new = sum((query.qid, did) not in answers for query, dids in found for did in dids)
            bar.update(self.num_rows - new)
            for group in self._ask(found, answers.keys(), failed) if new else ():
                answered = {(one.qid, one.did): (one.yes, one.no, one.judge) for one in group if not one.failed}
                journal.append(answered, [(one.qid, one.did) for one in group if one.failed])
                for one in group:
                    if (one.qid, one.did) not in failed:  # what failed before says nothing of the judge as it is now
                        failures.see(one)
                    if one.failed:
                        reasons[one.failed[:_REASON_CHARACTERS]] += 1
                # only now: what is being judged is told from what was by not being here
                answers |= answered
                bar.update(len(group))
        table = self._table(found, answers)
        write_table(self.file, table)
        journal.path.unlink()
        said = Counter(table["relevant"].to_pylist())
        return JudgedTask(
            name=self.name,
            instruction=self.instruction,
            exempt=self.exempt,
            judges=sorted(table["judge"].unique().to_pylist()),
            counts=JudgeCounts(yes=said[True], no=said[False], undecided=said[None], failed=reasons.total()),
            failures=dict(reasons.most_common(5)),
            examples=self._examples(found, table),
        )

    def _found(self) -> list[tuple[Query, list[str]]]:
        """The candidates of each query that are not known to be relevant, best first."""
        queries = {query.qid: query for query in self.task.queries}
        pool = {candidate.did for candidate in self.task.candidates}
        found = []
        for qid, dids in read_mined(self.retrieved, self.task).items():
            if qid not in queries or not pool.issuperset(dids):
                strange = qid if qid not in queries else next(did for did in dids if did not in pool)
                raise DatasetError(
                    f"{self.retrieved / self.file.name} names {strange!r}, which {self.task.label} does not have: was "
                    "it retrieved from other data?"
                )
            known = {*queries[qid].positives, *queries[qid].also_relevant}
            found.append((queries[qid], [did for did in dict.fromkeys(dids) if did not in known]))
        return found

    def _known(self) -> tuple[dict[_Ids, _Answer], set[_Ids]]:
        """The answers in the file, if there is one, and what failed when it was written."""
        if not self.file.is_file():
            return {}, set()
        table = _read(self.file)
        _same_judge(json.loads((table.schema.metadata or {}).get(_ASKED, b"{}")), self.asked, self.file)
        columns = (table[name].to_pylist() for name in ("qid", "did", "yes_logit", "no_logit", "judge"))
        answers = {(qid, did): (yes, no, name) for qid, did, yes, no, name in zip(*columns, strict=True)}
        # a file is written once everything was asked: what is not in it failed
        return answers, {(query.qid, did) for query, dids in self._found() for did in dids} - answers.keys()

    def _ask(
        self, found: Sequence[tuple[Query, list[str]]], answered: Container[_Ids], failed: Container[_Ids]
    ) -> Iterable[Sequence[Verdict]]:
        """Verdicts on what is not answered; what failed before comes last, so that it cannot keep the rest waiting."""
        pool = {candidate.did: candidate for candidate in self.task.candidates}
        pairs = (
            Pair(task=self.name, query=query, candidate=pool[did], instruction=self.instruction)
            for again in (False, True)
            for query, dids in found
            for did in dids
            if (query.qid, did) not in answered and ((query.qid, did) in failed) is again
        )
        if not self.exempt:
            return self.by.judge(pairs)
        return [[Verdict(pair.query.qid, pair.candidate.did, yes=-1.0, no=1.0, judge=EXEMPT) for pair in pairs]]

    def _table(self, found: Sequence[tuple[Query, list[str]]], answers: Mapping[_Ids, _Answer]) -> pa.Table:
        """The answers in the order of retrieval."""
        rows = (
            (query.qid, did, yes, no, None if yes == no else yes > no, name)
            for query, dids in found
            for did in dids
            if (query.qid, did) in answers
            for yes, no, name in [answers[query.qid, did]]
        )
        columns = list(zip(*rows, strict=True)) or [()] * len(_SCHEMA)
        arrays = [pa.array(column, one.type) for column, one in zip(columns, _SCHEMA, strict=True)]
        return pa.Table.from_arrays(arrays, schema=_SCHEMA.with_metadata({_ASKED: json.dumps(self.asked).encode()}))

    def _examples(self, found: Sequence[tuple[Query, list[str]]], table: pa.Table) -> list[Example]:
        """A few pairs to look at, always the same ones: as many of each kind as there are."""
        kinds: dict[bool | None, list[int]] = {True: [], False: [], None: []}
        for row, relevant in enumerate(table["relevant"].to_pylist()):
            kinds[relevant].append(row)
        chance = random.Random(0)
        drawn = (chance.sample(rows, min(EXAMPLES, len(rows))) for rows in kinds.values())
        chosen = [row for turn in zip_longest(*drawn) for row in turn if row is not None][:EXAMPLES]
        queries = {query.qid: (query, dids) for query, dids in found}
        pool = {candidate.did: candidate for candidate in self.task.candidates}
        examples = []
        for row in table.take(pa.array(sorted(chosen), pa.int64())).to_pylist():
            query, dids = queries[row["qid"]]
            verdict = Verdict(row["qid"], row["did"], row["yes_logit"], row["no_logit"], row["judge"])
            rank = dids.index(verdict.did) + 1
            examples.append(Example(query=query, candidate=pool[verdict.did], rank=rank, verdict=verdict))
        return sorted(examples, key=lambda one: one.verdict.no - one.verdict.yes)


class _Journal:
    """Answers of a run that is under way, one line of JSON each, after a line that says who was asked what."""

    def __init__(self, path: Path, asked: Mapping[str, str]) -> None:
        self.path = path
        self.answers: dict[_Ids, _Answer] = {}
        self.failed: set[_Ids] = set()
        whole = path.read_bytes() if path.is_file() else b""
        end = whole.rfind(b"\n") + 1
        if not end:
            path.write_text(json.dumps(asked) + "\n", encoding="utf-8")
            return
        if end < len(whole):  # a line torn by whatever stopped the run
            os.truncate(path, end)
        first, *lines = whole[:end].decode("utf-8", errors="replace").splitlines()
        try:
            _same_judge(json.loads(first), asked, path)
            for line in lines:
                qid, did, yes, no, name = json.loads(line)
                if name is None:
                    self.failed.add((qid, did))
                else:
                    self.answers[qid, did] = yes, no, name
        except (ValueError, TypeError, AttributeError) as error:
            raise JudgeError(f"{path} holds a line that is no verdict ({error}): remove the file.") from error

    def __enter__(self) -> _Journal:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, answers: Mapping[_Ids, _Answer], failed: Iterable[_Ids]) -> None:
        """Writes through to the file, so that it outlives the process: answers, and what got none."""
        lines = [[*ids, *answer] for ids, answer in answers.items()] + [[*ids, None, None, None] for ids in failed]
        self._file.write("".join(f"{json.dumps(line)}\n" for line in lines))
        self._file.flush()


def _same_judge(before: Mapping[str, str], asked: Mapping[str, str], path: Path) -> None:
    for name, value in asked.items():
        if before.get(name) != value:
            raise JudgeError(
                f"{path} was made with the {name} {before.get(name)!r}, which is {value!r} now: choose another folder, "
                "or remove the file."
            )


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is not there: judge this task first.") from error
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path} is no Parquet file of verdicts ({error}).") from error
