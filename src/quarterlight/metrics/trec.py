"""The metrics of NIST's trec_eval, by its own code (``pytrec_eval``), for runs that hold the first candidates.

trec_eval orders a run by score and breaks ties by the id of the candidate, the later in the alphabet first; candidates
that a run leaves out are not found at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_NAMES = {
    "ndcg": "ndcg_cut",
    "ndcg_linear": "ndcg_cut",
    "recall": "recall",
    "hit": "success",
    "precision": "P",
}
"""Our name of a metric at k -> that of trec_eval."""

_WHOLE = {"mrr": "recip_rank", "map": "map"}
"""The same for metrics of a whole run."""


def trec_name(name: str) -> str | None:
    """What trec_eval calls one of our metrics; ``None`` for those that it has not, or defines in another way.

    >>> trec_name("ndcg@5"), trec_name("map@5")
    ('ndcg_cut.5', None)
    """
    match = re.fullmatch(r"(\w+)@(\d+)", name)
    if match is None:
        return _WHOLE.get(name)
    return f"{_NAMES[match[1]]}.{match[2]}" if match[1] in _NAMES else None


def trec_values(
    names: Iterable[str], run: Mapping[str, Mapping[str, float]], qrels: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, float]]:
    """Our name of each metric that trec_eval has -> query id -> value.

    run: query id -> id of a candidate -> score, higher is better.  qrels: query id -> id of a positive -> grade.
    Raises ModuleNotFoundError without ``pytrec_eval``, which the extra ``eval`` installs.

    >>> trec_values(["hit@1", "mrr"], {"q": {"a": 0.9, "b": 0.8}}, {"q": {"b": 1}})
    {'hit@1': {'q': 0.0}, 'mrr': {'q': 0.5}}
    """
    import pytrec_eval

    wanted = {name: measure for name in names if (measure := trec_name(name)) is not None}
    if not wanted:
        return {}
    evaluator = pytrec_eval.RelevanceEvaluator(
        {qid: dict(grades) for qid, grades in qrels.items()}, set(wanted.values())
    )
    values = evaluator.evaluate({qid: dict(scores) for qid, scores in run.items()})
    return {
        name: {qid: value[measure.replace(".", "_")] for qid, value in values.items()}
        for name, measure in wanted.items()
    }
