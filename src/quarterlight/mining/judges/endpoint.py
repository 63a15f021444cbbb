"""A judge behind a server that speaks OpenAI's chat completions, such as vLLM or ``transformers serve``."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import itertools
import json
import math
import random
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

from quarterlight.errors import ImageError, JudgeError
from quarterlight.mining.judges import Pair, Verdict, shown, spelling
from quarterlight.records import ImageSource

try:
    import httpx2
except ImportError as error:
    raise JudgeError("Judging by a server needs httpx2: pip install -e '.[train]'.") from error

_TOP_LOGPROBS = (20, 5, None)
"""How many likely tokens are asked for; a server that refuses is asked for fewer, at last for none."""

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses of what may pass
_HOPELESS = (401, 402, 403, 404, 405)  # statuses that the next request would meet as well
_LONGEST_WAIT_S = 60.0
_LOSSLESS_PIXELS = 256 * 256  # up to which a picture is sent as PNG, and above as JPEG
_CACHED_PICTURES = 512
_WORDS = 160  # characters of an answer that are quoted in a message


class EndpointJudge:
    """Asks for one token with its likeliest alternatives; ``concurrency`` requests are always under way.

    Relevance compares the log-probabilities of the likeliest spellings of yes and no, which differ as their logits do.
    Where only one of them is among the likely tokens, the other counts as less likely than any of those.  A server that
    gives no log-probabilities is taken at its word: logits of 1 and -1, and ``(text)`` after the name of the judge.

    A request that times out, meets no server or a status that may pass (429, 5xx, ...) is sent again up to ``retries``
    times, after waits that double from ``backoff_s`` or are as long as the server wishes; then the pair has failed, as
    it has at once when the answer is neither yes nor no.

    url: up to and including ``/v1``.  model: as the server knows it.  api_key: sent as a bearer token.
    timeout_s: of a whole request.  max_pixels: of a picture as it is shown.
    Raises JudgeError for an address that is none, and when the server would refuse every request: wrong key, path or
    model.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 32,
        timeout_s: float = 120.0,
        retries: int = 5,
        backoff_s: float = 0.5,
        max_pixels: int = 1_048_576,
    ) -> None:
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL:
            parsed = None
        if parsed is None or parsed.scheme not in ("http", "https") or not parsed.host:
            raise JudgeError(f"{url!r} is not the address of a server: give one such as http://localhost:8000/v1.")
        self.name = model
        self.url = f"{url.rstrip('/')}/chat/completions"
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.retries = retries
        self.backoff_s = backoff_s
        self.max_pixels = max_pixels
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._top_logprobs = iter(_TOP_LOGPROBS)
        self._num_logprobs: int | None = next(self._top_logprobs)
        self._picture = functools.lru_cache(_CACHED_PICTURES)(self._encode)

    def judge(self, pairs: Iterable[Pair]) -> Iterator[Sequence[Verdict]]:
        """Verdicts in the order in which the server answers.  Cannot be used where an event loop runs already."""
        rest = iter(pairs)
        limits = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            client = httpx2.AsyncClient(timeout=None, limits=limits, headers=self._headers)
            under_way: set[asyncio.Task[Verdict]] = set()
            try:
                while True:
                    new = itertools.islice(rest, self.concurrency - len(under_way))
                    under_way |= {loop.create_task(self._ask(client, pair)) for pair in new}
                    if not under_way:
                        return
                    done, under_way = runner.run(_first(under_way))
                    yield [task.result() for task in done]
            finally:
                runner.run(_close(client, under_way))

    async def _ask(self, client: httpx2.AsyncClient, pair: Pair) -> Verdict:
        ids = pair.query.qid, pair.candidate.did
        try:
            messages = [{"role": "user", "content": await self._content(pair)}]
        except ImageError as error:
            return Verdict(*ids, failed=str(error))
        trouble = ""
        for attempt in range(self.retries + 1):
            wait = min(self.backoff_s * 2**attempt, _LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
            try:
                async with asyncio.timeout(self.timeout_s):
                    response = await self._post(client, messages)
            except TimeoutError:
                trouble = f"no answer within {self.timeout_s:g} seconds"
            except httpx2.HTTPError as error:
                trouble = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                if response.status_code == 200:
                    return self._read(ids, response.text)
                trouble = f"status {response.status_code}: {_quote(response.text)}"
                if response.status_code in _HOPELESS:
                    raise JudgeError(
                        f"{self.url} refuses to judge with {self.name!r} ({trouble}): mend it and start again."
                    )
                if response.status_code not in _AGAIN:
                    break
                wait = max(wait, _wished(response.headers.get("Retry-After", "")))
            if attempt < self.retries:
                await asyncio.sleep(wait)
        return Verdict(*ids, failed=trouble)

    async def _post(self, client: httpx2.AsyncClient, messages: list[dict[str, Any]]) -> httpx2.Response:
        """The response to a request with as many log-probabilities as the server will give."""
        while True:
            number = self._num_logprobs
            body = {"model": self.name, "messages": messages, "max_tokens": 1, "temperature": 0}
            if number is not None:
                body |= {"logprobs": True, "top_logprobs": number}
            response = await client.post(self.url, json=body)
            if response.status_code not in (400, 422) or number is None or "logprobs" not in response.text:
                return response
            if number == self._num_logprobs:  # no other request has found it out meanwhile
                self._num_logprobs = next(self._top_logprobs)

    async def _content(self, pair: Pair) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = []
        for words, picture in pair.prompt():
            content.append({"type": "text", "text": words})
            if picture is not None:
                cached = isinstance(picture, Hashable)  # an opened picture is not
                address = await asyncio.to_thread(self._picture if cached else self._encode, picture)  # type: ignore[arg-type]
                content.append({"type": "image_url", "image_url": {"url": address}})
        return content

    def _encode(self, source: ImageSource) -> str:
        """The picture as a data URI. Raises ImageError."""
        picture = shown(source, self.max_pixels)
        lossless = picture.width * picture.height <= _LOSSLESS_PIXELS
        stream = io.BytesIO()
        picture.save(stream, "PNG") if lossless else picture.save(stream, "JPEG", quality=92)
        return f"data:image/{'png' if lossless else 'jpeg'};base64,{base64.b64encode(stream.getvalue()).decode()}"

    def _read(self, ids: tuple[str, str], text: str) -> Verdict:
        """What the server said: in log-probabilities, else in words."""
        try:
            choice = json.loads(text)["choices"][0]
            tokens = (choice.get("logprobs") or {}).get("content") or []
            likely = [(str(one["token"]), float(one["logprob"])) for one in tokens[0]["top_logprobs"]] if tokens else []
            said = str((choice.get("message") or {}).get("content") or "")
        except (ValueError, LookupError, TypeError, AttributeError):
            return Verdict(*ids, failed=f"an answer in another form than OpenAI's chat completions: {_quote(text)}")
        if likely:
            best = {word: [value for token, value in likely if spelling(token) == word] for word in ("yes", "no")}
            if not best["yes"] and not best["no"]:
                words = ", ".join(repr(token) for token, _ in likely[:3])
                return Verdict(*ids, failed=f"neither yes nor no is likely; likeliest are {words}")
            if not all(map(math.isfinite, (*best["yes"], *best["no"]))):
                return Verdict(*ids, failed=f"log-probabilities that are no numbers: {_quote(text)}")
            # what is not listed is less likely than all that is
            unlisted = math.nextafter(min(value for _, value in likely if math.isfinite(value)), -math.inf)
            yes, no = (max(best[word], default=unlisted) for word in ("yes", "no"))
            return Verdict(*ids, yes=yes, no=no, judge=self.name)
        answer = re.match(r"\W*(yes|no)\b", said, re.IGNORECASE)
        if answer is None:
            return Verdict(*ids, failed=f"neither yes nor no: {_quote(said)}")
        yes = 1.0 if answer[1].lower() == "yes" else -1.0
        return Verdict(*ids, yes=yes, no=-yes, judge=f"{self.name} (text)")


async def _first(tasks: set[asyncio.Task[Verdict]]) -> tuple[set[asyncio.Task[Verdict]], set[asyncio.Task[Verdict]]]:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _close(client: httpx2.AsyncClient, tasks: set[asyncio.Task[Verdict]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()


def _wished(header: str) -> float:
    """Seconds that the server wants us to wait; 0 if it does not say, or says a date."""
    return min(float(header), _LONGEST_WAIT_S) if re.fullmatch(r"\d+(\.\d+)?", header) else 0.0


def _quote(text: str) -> str:
    short = " ".join(text.split())
    return repr(short if len(short) <= _WORDS else f"{short[:_WORDS]}…")
