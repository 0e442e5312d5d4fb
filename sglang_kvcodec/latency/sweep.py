"""Asks every server every prompt at every bandwidth.

Each repeat has a prefix of its own. Every server with kvcodec computes and publishes it; then, for each bandwidth, each
is asked a question after that prefix, having forgotten what it holds, and the server without kvcodec computes it. The
order changes from repeat to repeat. A planner is asked some times before it is measured, so that it knows the link.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from sglang_kvcodec.latency.loads import Load, Prompt, make_prompt
from sglang_kvcodec.latency.samples import DEVICE, PLANNER, PLANNER_FIRST, PREFILL, Method, Sample, hit
from sglang_kvcodec.latency.servers import UNLIMITED, bits_per_s_of
from sglang_kvcodec.latency.texts import fresh_texts
from sglang_kvcodec.testing.sglang_client import SGLangClient

AS_IS = "as is"
"""The bandwidth of a link that this does not shape."""
_SETTLE_S = 2.0
"""Between two questions while a planner settles: as long as it takes what it knows of a link to get old."""
PUBLISH_TIMEOUT_S = 600.0

Shape = Callable[[str, Sequence[SGLangClient]], object]
"""Gives the link another bandwidth, which these servers have noticed when it returns."""
Item = TypeVar("Item")


class Progress(Protocol):
    """Is told how far it is."""

    def begin(self, steps: int) -> None:
        """Comes once, before the first of so many steps."""

    def step(self, words: str) -> None:
        """One step more."""


@dataclasses.dataclass(frozen=True)
class SweepPlan:
    """What is measured.

    Attributes:
        load: what is asked.
        bandwidths: ``"unlimited"``, or such as ``"100Mbps"``; ``(AS_IS,)`` where the link is not ours.
        repeats: prompts that count; one more comes before them, to warm up.
        settle: questions to a planner at each bandwidth before it is measured.
    """

    load: Load
    bandwidths: tuple[str, ...]
    repeats: int
    settle: int

    @property
    def steps(self) -> int:
        """Of one server: preparing each prompt, and measuring it at each bandwidth."""
        return 2 + self.repeats * (1 + len(self.bandwidths))

    @property
    def fastest(self) -> str:
        """Of the bandwidths."""
        return max(self.bandwidths, key=_rate)

    def bandwidths_of(self, repeat: int) -> list[str]:
        """In the order of this repeat; the warm-up has the fastest alone.

        The fastest is always the last: prefixes are stored before it changes, and a server that stores what another one
        of its tier has stored already fetches it.
        """
        others = [name for name in self.bandwidths if name != self.fastest] if repeat else []
        return [*rotated(others, repeat), self.fastest]


def _rate(bandwidth: str) -> float:
    return math.inf if bandwidth in (AS_IS, UNLIMITED) else bits_per_s_of(bandwidth) or math.inf


class Sweep:
    """Measures groups of servers, one after another, with the same prompts."""

    def __init__(self, plan: SweepPlan, servers: int, progress: Progress) -> None:
        """Asks nothing yet.

        Args:
            plan: what is measured.
            servers: how many, in all groups together.
            progress: is told how far it is, from when the first servers are up.
        """
        self._plan = plan
        self._servers = servers
        self._progress = progress
        self._texts: Iterator[str] | None = None
        self._prompts: list[Prompt] = []
        self.samples: list[Sample] = []
        """All that count."""

    def run(self, clients: Mapping[Method, SGLangClient], shape: Shape) -> None:
        """Measures servers that run side by side; the first group has the one without kvcodec.

        Raises:
            OSError: a server is gone, or refused a request.
            RuntimeError: no text is left, or a server did not publish what it had computed.
            TimeoutError: a server would not forget, or not notice a change of the peer.
        """
        with_kvcodec = [client for method, client in clients.items() if method.has_kvcodec]
        for repeat in range(self._plan.repeats + 1):
            prompt = self._prompt(repeat, next(iter(clients.values())))
            # What a planner with several tiers fetched of one it would not store in the others, so it comes first.
            for method, client in sorted(clients.items(), key=lambda pair: pair[0].name != PLANNER):
                if method.has_kvcodec:
                    self._store(method, client, prompt)
                self._progress.step(f"{method.name}: prefix {repeat}")
            for bandwidth in self._plan.bandwidths_of(repeat):
                shape(bandwidth, with_kvcodec)
                for method, client in rotated(list(clients.items()), repeat):
                    found = list(self._measure(method, client, prompt, self._question(bandwidth)))
                    if repeat:
                        self.samples += [
                            dataclasses.replace(sample, bandwidth=bandwidth, repeat=repeat) for sample in found
                        ]
                    (ttft_s,) = (sample.reply.ttft_s for sample in found if sample.method == method.name)
                    self._progress.step(f"{method.name} at {bandwidth}: {ttft_s:.2f} s")

    def _prompt(self, repeat: int, baseline: SGLangClient) -> Prompt:
        if self._texts is None:
            self._progress.begin(self._servers * self._plan.steps)
            self._texts = fresh_texts(baseline.count_tokens, self._plan.load.text_tokens)
        while len(self._prompts) <= repeat:
            self._prompts.append(make_prompt(self._plan.load, self._texts, baseline))
        return self._prompts[repeat]

    def _question(self, bandwidth: str) -> int:
        """One for each, so that no bandwidth finds stored what another one has computed."""
        return 1 + self._plan.bandwidths.index(bandwidth)

    def _store(self, method: Method, client: SGLangClient, prompt: Prompt) -> None:
        client.forget()
        client.chat(prompt.stored, self._plan.load.answer_tokens)
        if not client.wait_published(PUBLISH_TIMEOUT_S):
            raise RuntimeError(f"{method.name} has not published a prefix within {PUBLISH_TIMEOUT_S:.0f} s")

    def _measure(self, method: Method, client: SGLangClient, prompt: Prompt, question: int) -> Iterator[Sample]:
        """One request, of a planner and of the server without kvcodec two that count."""
        tokens, messages = self._plan.load.answer_tokens, prompt.asked(question)
        if method.name == PREFILL:
            client.flush_cache()
            for name in (PREFILL, DEVICE):
                yield Sample(name, "", 0, client.chat(messages, tokens))
            return
        if method.name == PLANNER:
            for again in range(self._plan.settle):
                first = hit(client, messages, tokens)
                if again == 0:
                    yield dataclasses.replace(first, method=PLANNER_FIRST)
                if again + 1 < self._plan.settle:
                    time.sleep(_SETTLE_S)
        yield dataclasses.replace(hit(client, messages, tokens), method=method.name)


def rotated(items: Sequence[Item], by: int) -> list[Item]:
    """``items`` from another start in every round, so that none always comes first."""
    by = by % len(items) if items else 0
    return [*items[by:], *items[:by]]
