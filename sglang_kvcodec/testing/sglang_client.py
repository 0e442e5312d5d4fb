"""A client of an SGLang server's HTTP interface that measures what a user sees. Standard library only."""

from __future__ import annotations

import dataclasses
import http.client
import itertools
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, str]
"""``{"role": …, "content": …}``."""


@dataclasses.dataclass(frozen=True)
class CachedTokens:
    """Prompt tokens that were not computed, by where they came from."""

    device: int = 0
    host: int = 0
    storage: int = 0


@dataclasses.dataclass(frozen=True)
class ChatReply:
    """An answer and how it came about.

    Attributes:
        ttft_s: from sending the request to the first piece of text.
        total_s: from sending the request to the end.
        rid: what the server calls the request, in a trace too.
        pieces_s: from sending the request to each piece of text.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached: CachedTokens
    ttft_s: float
    total_s: float
    finish_reason: str
    rid: str = ""
    pieces_s: tuple[float, ...] = ()

    @property
    def longest_gap_s(self) -> float:
        """The longest time from one piece of text to the next."""
        return max((after - before for before, after in itertools.pairwise(self.pieces_s)), default=0.0)


class SGLangClient:
    """Talks to one server. Stateless and thread-safe."""

    def __init__(self, base_url: str, timeout_s: float = 300.0) -> None:
        self.base_url = base_url
        self._timeout_s = timeout_s
        # A proxy in the environment is not for servers on this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def is_healthy(self) -> bool:
        """Whether the server is up."""
        try:
            with self._opener.open(f"{self.base_url}/health", timeout=5.0) as response:
                return bool(response.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def chat(
        self, messages: Sequence[Message], max_tokens: int, extra: Mapping[str, object] | None = None
    ) -> ChatReply:
        """Sends a conversation, greedy unless ``extra`` says otherwise, and reads the answer as it comes.

        Raises:
            OSError: the server is gone or refused the request.
        """
        body = {
            **_greedy(messages, max_tokens),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_cached_tokens_details": True,
            **(extra or {}),
        }
        started = time.perf_counter()
        came_s: list[float] = []
        pieces: list[str] = []
        usage: dict[str, Any] = {}
        cached = CachedTokens()
        finish_reason = rid = ""
        for event in self._events("/v1/chat/completions", body):
            if "error" in event:
                raise OSError(f"{self.base_url} answered {event['error']}")
            rid = event.get("id") or rid
            for choice in event.get("choices", ()):
                piece = choice["delta"].get("content") or choice["delta"].get("reasoning_content")
                if piece:
                    came_s.append(time.perf_counter() - started)
                    pieces.append(piece)
                finish_reason = choice.get("finish_reason") or finish_reason
            usage = event.get("usage") or usage
            # Absent where nothing was cached.
            if details := (event.get("sglext") or {}).get("cached_tokens_details"):
                cached = CachedTokens(**{tier: details.get(tier) or 0 for tier in ("device", "host", "storage")})
        total_s = time.perf_counter() - started
        return ChatReply(
            text="".join(pieces),
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
            cached=cached,
            ttft_s=came_s[0] if came_s else total_s,
            total_s=total_s,
            finish_reason=finish_reason,
            rid=rid,
            pieces_s=tuple(came_s),
        )

    def decided(self, messages: Sequence[Message], max_tokens: int) -> tuple[str, float]:
        """The greedy answer and how clear it is.

        Returns:
            The text, and the smallest difference between the log-probabilities of one of its tokens and the next best.

        Raises:
            OSError: the server is gone or refused the request.
        """
        body = {**_greedy(messages, max_tokens), "logprobs": True, "top_logprobs": 2}
        with self._post("/v1/chat/completions", body) as response:
            choice = json.load(response)["choices"][0]
        margins = []
        for token in choice["logprobs"]["content"]:
            best, next_best = (each["logprob"] for each in token["top_logprobs"])
            margins.append(best - next_best)
        return choice["message"]["content"], min(margins)

    def count_tokens(self, text: str) -> int:
        """How many tokens the model's tokenizer makes of ``text``."""
        with self._post("/tokenize", {"prompt": text}) as response:
            return int(json.load(response)["count"])

    def flush_cache(self, timeout_s: float = 30.0) -> None:
        """Makes the server forget all KV that it holds itself, as soon as it is idle.

        Raises:
            TimeoutError: it was busy for ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        request = urllib.request.Request(f"{self.base_url}/flush_cache", method="POST")
        while True:
            try:
                with self._opener.open(request, timeout=self._timeout_s):
                    return
            except urllib.error.HTTPError as error:
                error.close()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.base_url} would not flush its cache for {timeout_s} s") from error
            time.sleep(0.1)

    def forget(self, timeout_s: float = 60.0) -> None:
        """Makes a server with kvcodec forget all KV that it holds, on the device and coded in host memory.

        Raises:
            TimeoutError: it would not for ``timeout_s``.
        """
        self.flush_cache()
        deadline = time.monotonic() + timeout_s
        request = urllib.request.Request(f"{self.base_url}/hicache/storage-backend/clear", method="POST")
        while True:
            try:
                with self._opener.open(request, timeout=self._timeout_s):
                    return
            except OSError as error:
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self.base_url} would not clear its host cache for {timeout_s} s") from error
            time.sleep(0.1)

    def model_path(self) -> str:
        """What model the server runs, as it was told."""
        with self._opener.open(f"{self.base_url}/model_info", timeout=self._timeout_s) as response:
            return str(json.load(response)["model_path"])

    def metrics(self) -> dict[str, float]:
        """The server's Prometheus page: the sum over all labels of every series."""
        totals: dict[str, float] = {}
        for series, value in self._series():
            name = series.partition("{")[0]
            totals[name] = totals.get(name, 0.0) + value
        return totals

    def metric_by(self, name: str, label: str) -> dict[str, float]:
        """A metric by one of its labels: the sum over all others for each value of it."""
        totals: dict[str, float] = {}
        for series, value in self._series():
            if series.partition("{")[0] == name and (found := re.search(rf'[{{,]{label}="([^"]*)"', series)):
                totals[found[1]] = totals.get(found[1], 0.0) + value
        return totals

    def _series(self) -> Iterator[tuple[str, float]]:
        with self._opener.open(f"{self.base_url}/metrics", timeout=self._timeout_s) as response:
            for line in response.read().decode().splitlines():
                if line and not line.startswith("#"):
                    series, _, value = line.rpartition(" ")
                    yield series, float(value)

    def wait_published(self, timeout_s: float = 60.0, settle_s: float = 0.5) -> bool:
        """Waits until the server has sent its peer what it had computed: nothing queued, and no page for ``settle_s``.

        Returns:
            False if it was still at it after ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        state: tuple[float, ...] = ()
        since = time.monotonic()
        while time.monotonic() < deadline:
            values = self.metrics()
            queued = values.get("kvcodec_publish_queue_bytes", 0.0)
            now = tuple(values.get(f"kvcodec_{name}_total", 0.0) for name in ("published_pages", "publish_drops"))
            if queued or now != state:
                state, since = now, time.monotonic()
            elif time.monotonic() - since >= settle_s:
                return True
            time.sleep(0.05)
        return False

    def _post(self, path: str, body: Mapping[str, object]) -> http.client.HTTPResponse:
        request = urllib.request.Request(
            self.base_url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            response: http.client.HTTPResponse = self._opener.open(request, timeout=self._timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                raise OSError(f"{self.base_url} answered {error.code}: {error.read().decode()[:500]}") from None
        return response

    def _events(self, path: str, body: Mapping[str, object]) -> Iterator[dict[str, Any]]:
        with self._post(path, body) as response:
            for line in response:
                data = line.removeprefix(b"data: ").strip()
                if line.startswith(b"data: ") and data != b"[DONE]":
                    yield json.loads(data)


def _greedy(messages: Sequence[Message], max_tokens: int) -> dict[str, object]:
    return {"model": "default", "messages": list(messages), "temperature": 0, "max_tokens": max_tokens}
