from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.mining.judges.server import ChatServer, answer, hang, says

from quarterlight.data.retrieval import RetrievalDataset
from quarterlight.errors import JudgeError
from quarterlight.mining.judge import JudgeRecipe, judge
from quarterlight.mining.judges import Pair, Verdict
from quarterlight.mining.judges.endpoint import EndpointJudge
from quarterlight.mining.judges.local import TransformersJudge
from quarterlight.records import Item

FIXTURE = Path(__file__).parents[2] / "fixtures" / "retrieval"


def ask(server: ChatServer, pairs: Sequence[Pair], **settings: Any) -> list[Verdict]:
    asking = EndpointJudge(server.url, "tiny", **{"backoff_s": 0.01, "timeout_s": 20.0, **settings})
    return [one for group in asking.judge(pairs) for one in group]


def test_a_server_says_what_the_model_here_says(judging_checkpoint: Path, whole_model: Any, pairs: list[Pair]) -> None:
    here = TransformersJudge(judging_checkpoint, dtype=torch.float32, device="cpu")
    expected = {(one.qid, one.did): one for group in here.judge(pairs) for one in group}
    with ChatServer(whole_model) as server:
        found = ask(server, pairs, api_key="secret")
    assert len(found) == len(server.bodies) == len(pairs)
    assert {one.judge for one in found} == {"tiny"} and {one.relevant for one in found} == {True, False}
    for one in found:
        other = expected[one.qid, one.did]
        assert one.yes - one.no == pytest.approx(other.yes - other.no, abs=1e-3)
    assert set(server.keys) == {"Bearer secret"}


def test_the_prompt_is_the_template_of_the_paper(pairs: list[Pair]) -> None:
    with ChatServer(trouble=lambda *_: says("yes")) as server:
        ask(server, [next(one for one in pairs if one.task == "emoji/it2i")])
    [body] = server.bodies
    parts = body["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url", "text", "image_url", "text"]
    assert parts[0]["text"] == "Determine whether it is relevant.\nQuery: "
    assert parts[2]["text"].startswith(" ") and parts[2]["text"].endswith("\nTarget: ")
    assert parts[4]["text"].startswith("\nPlease make your judgment. If relevant, output 'yes'.")
    assert parts[1]["image_url"]["url"].startswith("data:image/png;base64,")


def test_as_many_requests_are_under_way_as_asked_for(pairs: list[Pair]) -> None:
    together = threading.Barrier(32)  # breaks unless 32 requests wait at once
    with ChatServer(trouble=lambda *_: together.wait(10) * 0 or says("no")) as server:
        found = ask(server, (pairs * 2)[:64], concurrency=32)
    assert len(found) == 64 and not together.broken


def test_only_one_answer_among_the_likely_tokens_is_enough(pairs: list[Pair]) -> None:
    top = [{"token": "ĠNO", "logprob": -0.1}, {"token": "maybe", "logprob": -3.0}, {"token": "no", "logprob": -2.0}]
    body = {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}, "message": {"content": "NO"}}]}
    with ChatServer(trouble=lambda *_: answer(body)) as server:
        [found] = ask(server, pairs[:1])
    assert (found.yes, found.no, found.relevant) == (pytest.approx(-3.0), -0.1, False)
    body["choices"][0]["logprobs"] = {"content": [{"top_logprobs": [{"token": "yes", "logprob": -0.7}]}]}
    with ChatServer(trouble=lambda *_: answer(body)) as server:
        assert ask(server, pairs[:1])[0].relevant is True  # what is not listed is less likely still
    body["choices"][0]["logprobs"] = {"content": [{"top_logprobs": [{"token": "yes", "logprob": float("nan")}]}]}
    with ChatServer(trouble=lambda *_: answer(body)) as server:
        assert "no numbers" in ask(server, pairs[:1])[0].failed


@pytest.mark.parametrize(("words", "relevant"), [(" Yes.", True), ("no", False), ("'NO'", False)])
def test_a_server_without_log_probabilities_is_taken_at_its_word(pairs: list[Pair], words: str, relevant: bool) -> None:
    with ChatServer(trouble=lambda *_: says(words)) as server:
        [found] = ask(server, pairs[:1])
    assert (found.relevant, found.yes, found.judge) == (relevant, 1.0 if relevant else -1.0, "tiny (text)")


@pytest.mark.parametrize(("most", "asked"), [(5, [20, 5, 5]), (-1, [20, 5, None, None])])
def test_a_server_that_refuses_log_probabilities_is_asked_for_fewer(
    pairs: list[Pair], most: int, asked: list[int | None]
) -> None:
    def refuse(_: int, body: Any) -> Any:
        if body.get("top_logprobs", -1) > most:
            return answer({"error": {"message": "top_logprobs is too large"}}, 400)
        return says("yes")

    with ChatServer(trouble=refuse) as server:
        found = ask(server, pairs[:2], concurrency=1)
    assert [body.get("top_logprobs") for body in server.bodies] == asked
    assert all(one.relevant for one in found)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_trouble_is_waited_out(pairs: list[Pair], status: int) -> None:
    with ChatServer(trouble=lambda n, _: answer(b"busy", status, Retry_After="0") if n < 2 else says("no")) as server:
        [found] = ask(server, pairs[:1])
    assert found.relevant is False and len(server.bodies) == 3


@pytest.mark.parametrize(
    ("trouble", "requests", "reason"),
    [
        (lambda *_: answer(b"on fire", 500), 3, "status 500: 'on fire'"),
        (lambda *_: answer(b"too long", 413), 1, "status 413: 'too long'"),
        (lambda *_: answer(b"<html>hello"), 1, "in another form than OpenAI's chat completions: '<html>hello'"),
        (lambda *_: answer({"choices": []}), 1, "in another form"),
        (lambda *_: answer([1]), 1, "in another form"),
        (lambda *_: says("I think"), 1, "neither yes nor no: 'I think'"),
        (lambda *_: says(""), 1, "neither yes nor no: ''"),
        (hang, 3, "no answer within 0.2 seconds"),
    ],
)
def test_lasting_trouble_fails_the_pair(pairs: list[Pair], trouble: Any, requests: int, reason: str) -> None:
    with ChatServer(trouble=trouble) as server:
        [found] = ask(server, pairs[:1], retries=2, timeout_s=0.2 if trouble is hang else 20.0)
    assert reason in found.failed and len(server.bodies) == requests


def test_unlikely_answers_fail_with_what_was_likely(pairs: list[Pair]) -> None:
    body = {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "<think>", "logprob": 0.0}]}]}}]}
    with ChatServer(trouble=lambda *_: answer(body)) as server:
        [found] = ask(server, pairs[:1])
    assert found.failed == "neither yes nor no is likely; likeliest are '<think>'"


def test_a_server_that_refuses_us_stops_the_run(pairs: list[Pair]) -> None:
    with (
        ChatServer(trouble=lambda *_: answer(b"bad key", 401)) as server,
        pytest.raises(JudgeError, match=r"refuses to judge with 'tiny' \(status 401: 'bad key'\)"),
    ):
        ask(server, pairs)
    with pytest.raises(JudgeError, match="not the address of a server"):
        EndpointJudge("localhost:8000/v1", "tiny")


def test_no_server_fails_after_the_last_try(pairs: list[Pair]) -> None:
    server = ChatServer()
    server.server_close()
    found = ask(server, pairs[:3], retries=1)
    assert len(found) == 3 and all("ConnectError" in one.failed for one in found)


def test_what_cannot_be_shown_is_not_sent(pairs: list[Pair], picture: Any) -> None:
    items = [Item(image=b"no picture"), Item(image=picture(0, 400, 300))]
    mixed = [replace(pairs[0], candidate=replace(pairs[0].candidate, item=item)) for item in items]
    with ChatServer(trouble=lambda *_: says("yes")) as server:
        found = ask(server, mixed)
    assert sorted(bool(one.failed) for one in found) == [False, True]
    [body] = server.bodies
    assert body["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/jpeg;base64,")


def test_a_server_that_breaks_down_loses_nothing(whole_model: Any, tmp_path: Path) -> None:
    task = RetrievalDataset(FIXTURE / "emoji").load("t2i", "train")
    found = [(query.qid, one.did) for query in task.queries[:4] for one in task.candidates[:6]]
    known = {(query.qid, did) for query in task.queries for did in query.positives}
    asked = [ids for ids in found if ids not in known]
    qids, dids = zip(*found, strict=True)
    pq.write_table(pa.table({"qid": qids, "did": dids}), tmp_path / "emoji.t2i.parquet")

    def breaks(number: int, _: Any) -> Any:
        return answer(b"out of memory", 500) if number >= 10 else None

    def recipe(url: str) -> JudgeRecipe:
        return JudgeRecipe(backend="endpoint", model="tiny", url=url, concurrency=1, retries=0)

    out = tmp_path / "judged"
    with ChatServer(whole_model, breaks) as server, pytest.raises(JudgeError, match=r"status 500: 'out of memory'"):
        judge([task], tmp_path, out, recipe(server.url))
    with ChatServer(whole_model) as server:
        counts = judge([task], tmp_path, out, recipe(server.url))["emoji/t2i"]
    assert len(server.bodies) == len(asked) - 10
    assert counts.yes + counts.no == counts.pairs == len(asked)


def test_a_model_here_judges_the_same_by_recipe(judging_checkpoint: Path, whole_model: Any, tmp_path: Path) -> None:
    task = RetrievalDataset(FIXTURE / "easy_vqa").load("it2t", "train")
    rows = [(query.qid, one.did) for query in task.queries[:3] for one in task.candidates]
    qids, dids = zip(*rows, strict=True)
    pq.write_table(pa.table({"qid": qids, "did": dids}), tmp_path / "easy_vqa.it2t.parquet")
    here = JudgeRecipe(backend="transformers", model=str(judging_checkpoint))
    judge([task], tmp_path, tmp_path / "here", here)
    with ChatServer(whole_model) as server:
        there = JudgeRecipe(backend="endpoint", model="tiny", url=server.url)
        judge([task], tmp_path, tmp_path / "there", there)
    one, other = (pq.read_table(tmp_path / name / "easy_vqa.it2t.parquet").to_pylist() for name in ("here", "there"))
    assert [row["did"] for row in one] == [row["did"] for row in other]
    sure = [abs(row["yes_logit"] - row["no_logit"]) > 0.1 for row in other]  # the model here may compute in bfloat16
    assert [row["relevant"] for row, is_sure in zip(one, sure, strict=True) if is_sure] == [
        row["relevant"] for row, is_sure in zip(other, sure, strict=True) if is_sure
    ]
    assert sum(sure) > len(sure) / 2
