"""What a judge said, for people: ``report.html`` with counts and example pairs, and ``report.json``.

The page is one file with its pictures inside.  Names and texts come from other people's data, so every one of them is
escaped, and a content policy forbids scripts and anything from elsewhere.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from quarterlight.errors import ImageError
from quarterlight.files import replace_file
from quarterlight.images import load_image
from quarterlight.mining.judges import Verdict
from quarterlight.records import Candidate, Item, Query
from quarterlight.search.documents import thumbnail

EXAMPLES = 10
"""Pairs that are shown of each task."""

_TEXT_CHARACTERS = 600


@dataclass(frozen=True, kw_only=True)
class JudgeCounts:
    """What became of the pairs of a task."""

    yes: int = 0
    no: int = 0
    undecided: int = 0
    failed: int = 0

    @property
    def pairs(self) -> int:
        """All of them."""
        return self.yes + self.no + self.undecided + self.failed


@dataclass(frozen=True, kw_only=True)
class Example:
    """A judged pair to look at. rank: of the candidate among those retrieved for the query, from 1."""

    query: Query
    candidate: Candidate
    rank: int
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class JudgedTask:
    """One task after judging.

    name: ``dataset/task``.  judges: who gave its verdicts.  failures: commonest reasons -> how many pairs.
    """

    name: str
    instruction: str
    exempt: bool
    judges: Sequence[str]
    counts: JudgeCounts
    failures: Mapping[str, int]
    examples: Sequence[Example]


def write_judge_report(folder: Path, judge: str, tasks: Sequence[JudgedTask]) -> None:
    """Writes ``report.json`` and ``report.html``. judge: its name."""
    record = {"judge": judge, "tasks": {task.name: _record(task) for task in tasks}}
    replace_file(folder / "report.json", json.dumps(record, indent=1) + "\n")
    replace_file(folder / "report.html", _page(judge, tasks).encode(errors="backslashreplace"))


def _record(task: JudgedTask) -> dict[str, object]:
    examples = [
        {
            "qid": one.verdict.qid,
            "did": one.verdict.did,
            "rank": one.rank,
            "yes_logit": one.verdict.yes,
            "no_logit": one.verdict.no,
            "relevant": one.verdict.relevant,
            "judge": one.verdict.judge,
        }
        for one in task.examples
    ]
    return {
        "instruction": task.instruction,
        "exempt": task.exempt,
        "judges": list(task.judges),
        **vars(task.counts),
        "failures": dict(task.failures),
        "examples": examples,
    }


_KINDS = {"yes": "relevant", "no": "not relevant", "undecided": "undecided", "failed": "failed"}

_STYLE = """
:root { color-scheme: light dark; --ground: #f6f5f2; --card: #fff; --ink: #1d1d1b; --soft: #6b6963; --line: #e3e1db;
  --yes: #1f7a4d; --no: #b3402a; --undecided: #9a7a12; --failed: #8b8881; --tint: #00000008; }
@media (prefers-color-scheme: dark) { :root { --ground: #161614; --card: #201f1d; --ink: #eceae4; --soft: #a19e96;
  --line: #34322e; --yes: #5cc08d; --no: #e98368; --undecided: #d9b64a; --failed: #7d7a73; --tint: #ffffff0a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 2.5rem clamp(1rem, 4vw, 3rem) 5rem; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
a { color: inherit; text-decoration-color: var(--line); text-underline-offset: 3px; }
a:hover { text-decoration-color: currentColor; }
h1 { margin: 0; font-size: clamp(1.6rem, 3.5vw, 2.2rem); font-weight: 680; line-height: 1.15; letter-spacing: -.015em; }
.lead { margin: .4rem 0 2rem; color: var(--soft); overflow-wrap: anywhere; }
.totals { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 0 0 2.5rem;
  padding: 0; list-style: none; }
.totals li { padding: .85rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  border-top: 3px solid var(--kind, var(--ink)); }
.totals strong { display: block; font-size: 1.5rem; font-weight: 660; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.totals span { color: var(--soft); }
.yes { --kind: var(--yes); } .no { --kind: var(--no); } .undecided { --kind: var(--undecided); }
.failed { --kind: var(--failed); }
.scroll { overflow-x: auto; margin: 0 0 3.5rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .9rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 550; font-size: .85rem; }
th:first-child, td:first-child { text-align: left; }
td.shares { width: 34%; min-width: 9rem; }
.bar { display: flex; height: .6rem; overflow: hidden; border-radius: 99px; background: var(--line); }
.bar i { background: var(--kind); }
.zero { color: var(--soft); opacity: .55; }
section { margin: 0 0 3.5rem; scroll-margin-top: 1rem; }
h2 { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem .8rem; margin: 0 0 .2rem; font-size: 1.25rem;
  font-weight: 660; }
h2 small { color: var(--soft); font-size: .85rem; font-weight: 450; }
.told { margin: 0 0 1rem; max-width: 62rem; color: var(--soft); overflow-wrap: anywhere; }
.why { margin: 0 0 1rem; padding: .7rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-left: 3px solid var(--failed); border-radius: 6px; overflow-wrap: anywhere; }
.why p { margin: 0; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(31rem, 100%), 1fr)); gap: 1rem; margin: 0;
  padding: 0; list-style: none; }
.pair { display: flex; flex-direction: column; overflow: hidden; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.pair header { display: flex; align-items: baseline; gap: .6rem; padding: .55rem .9rem; color: var(--kind);
  border-bottom: 1px solid var(--line); background: color-mix(in srgb, var(--kind) 9%, transparent); }
.pair header b { font-weight: 660; }
.pair header span { margin-left: auto; color: var(--soft); font-size: .85rem; font-variant-numeric: tabular-nums; }
.sides { display: grid; grid-template-columns: 1fr 1fr; flex: 1; }
.side { min-width: 0; padding: .7rem .9rem .9rem; }
.side + .side { border-left: 1px solid var(--line); }
.side h3 { margin: 0 0 .45rem; color: var(--soft); font-size: .75rem; font-weight: 600; letter-spacing: .06em;
  text-transform: uppercase; }
.side img { display: block; width: 100%; height: 10.5rem; margin: 0 0 .5rem; object-fit: contain; background: #fff;
  border: 1px solid var(--line); border-radius: 6px; }
.side p { display: -webkit-box; margin: 0; overflow: hidden; overflow-wrap: anywhere; -webkit-box-orient: vertical;
  -webkit-line-clamp: 8; }
.side img + p { -webkit-line-clamp: 4; }
.side h3 + p { font-size: 1.1rem; }
.side p.gone { padding: .5rem .7rem; margin: 0 0 .5rem; color: var(--soft); font-size: 1rem; background: var(--tint);
  border-radius: 6px; }
.pair footer { padding: .4rem .9rem .5rem; color: var(--soft); font-size: .8rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.none { color: var(--soft); }
"""

_ZERO = ' class="zero"'
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def _page(judge: str, tasks: Sequence[JudgedTask]) -> str:
    total = JudgeCounts(**{kind: sum(getattr(task.counts, kind) for task in tasks) for kind in _KINDS})
    sums = "\n".join(
        f'<li class="{kind}"><strong>{getattr(total, kind):,}</strong><span>{label} · {_share(total, kind)}</span></li>'
        for kind, label in _KINDS.items()
    )
    rows = "\n".join(_row(task, number) for number, task in enumerate(tasks))
    heads = "".join(f"<th>{label}</th>" for label in ("task", "pairs", *_KINDS.values(), ""))
    sections = "\n".join(_section(task, number) for number, task in enumerate(tasks))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>Judged pairs</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Judged pairs</h1>
<p class="lead">{total.pairs:,} retrieved candidates, judged by {_text(judge)}. What is relevant is never a negative of
its query; what is not is a hard negative of it; the rest is used as neither.</p>
<ul class="totals">
{sums}
</ul>
<div class="scroll"><table>
<thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
{sections}
</body>
</html>
"""


def _row(task: JudgedTask, number: int) -> str:
    cells = "".join(
        f"<td{'' if count else _ZERO}>{count:,}</td>"
        for count in (task.counts.pairs, *(getattr(task.counts, kind) for kind in _KINDS))
    )
    return (
        f'<tr><td><a href="#task-{number}">{_text(task.name)}</a></td>{cells}'
        f'<td class="shares">{_bar(task.counts)}</td></tr>'
    )


def _bar(counts: JudgeCounts) -> str:
    parts = "".join(
        f'<i class="{kind}" style="width:{100 * getattr(counts, kind) / counts.pairs:.2f}%" '
        f'title="{label}: {_share(counts, kind)}"></i>'
        for kind, label in _KINDS.items()
        if getattr(counts, kind)
    )
    return f'<div class="bar">{parts}</div>'


def _share(counts: JudgeCounts, kind: str) -> str:
    """A percentage that is 0 or 100 only if it is so exactly."""
    if not counts.pairs:
        return "0 %"
    share = 100 * getattr(counts, kind) / counts.pairs
    if 0 < share < 0.1:
        return "under 0.1 %"
    return f"{min(share, 99.9) if share < 100 else share:.1f} %".replace(".0 %", " %")


def _section(task: JudgedTask, number: int) -> str:
    counts = task.counts
    said = " · ".join(f"{getattr(counts, kind):,} {label}" for kind, label in _KINDS.items() if getattr(counts, kind))
    told = "Not judged: all that was retrieved is taken for irrelevant." if task.exempt else _text(task.instruction)
    others = f"<small>by {_text(', '.join(task.judges))}</small>" if task.judges and not task.exempt else ""
    why = "".join(f"<p>{count:,} × {_text(reason)}</p>" for reason, count in task.failures.items())
    cards = "\n".join(map(_card, task.examples))
    return f"""<section id="task-{number}">
<h2>{_text(task.name)} <small>{said or "nothing was retrieved"}</small>{others}</h2>
<p class="told">{told}</p>
{f'<div class="why">{why}</div>' if why else ""}
{f'<ol class="pairs">{cards}</ol>' if cards else '<p class="none">There is no pair to show.</p>'}
</section>"""


def _card(example: Example) -> str:
    verdict = example.verdict
    kind = {True: "yes", False: "no", None: "undecided"}[verdict.relevant]
    return f"""<li class="pair {kind}">
<header><b>{_KINDS[kind].capitalize()}</b><span>{_logits(verdict)}</span></header>
<div class="sides">
<div class="side"><h3>Query</h3>{_item(example.query.item)}</div>
<div class="side"><h3>Target</h3>{_item(example.candidate.item)}</div>
</div>
<footer>found at rank {example.rank} · {_text(verdict.qid)} with {_text(verdict.did)}</footer>
</li>"""


def _logits(verdict: Verdict) -> str:
    return f"yes {verdict.yes:.2f} · no {verdict.no:.2f}".replace("-", "−")


def _item(item: Item) -> str:
    parts = []
    for source in item.images:
        try:
            data = base64.b64encode(thumbnail(load_image(source))).decode()
            parts.append(f'<img src="data:image/webp;base64,{data}" alt="">')
        except ImageError:
            parts.append('<p class="gone">a picture that cannot be read</p>')
    if text := (item.text or "").strip():
        short = text if len(text) <= _TEXT_CHARACTERS else f"{text[:_TEXT_CHARACTERS]}…"
        parts.append(f'<p dir="auto">{_text(short)}</p>')
    return "".join(parts)


def _text(text: str) -> str:
    """Text as it may stand between tags and in quoted attributes."""
    return escape(text, quote=True)
