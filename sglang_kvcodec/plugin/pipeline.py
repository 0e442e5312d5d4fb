"""One plan for all stages of a pipeline: which pages a request gets, which offloads are over, which loads have failed.

All stages must schedule alike: whatever scheduling hangs on is decided by the first, from what all have reported.
"""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sglang_kvcodec.plugin.stage_link import MOST_REPORTED

NOT_YET = -1
_MOST = 1 << 40
_FETCHES, _OFFLOADS, _LOAD = 0, 1, 2
VERDICT_S = 60.0
"""How long the first stage waits for what another says of a load, which it has said before its output came here."""


class Link(Protocol):
    """What is needed of a :class:`~sglang_kvcodec.plugin.stage_link.StageLink`; its docstrings hold."""

    stage: int
    stages: int

    def report(self, kind: int, numbers: Sequence[int]) -> None: ...  # noqa: D102
    def listen(self, on_report: Callable[[int, int, list[int]], None]) -> None: ...  # noqa: D102
    def decide(self, numbers: Sequence[int]) -> None: ...  # noqa: D102
    def decision(self, count: int) -> list[int]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class Fetch:
    """What one stage can say of the pages of a request that waits.

    Attributes:
        number: of the request, the same at all stages.
        pages: so many are ready; :data:`NOT_YET` while that is not final.
        most_pages: more will not come.
    """

    number: int
    pages: int
    most_pages: int


class _Heard:
    """What another stage has reported."""

    def __init__(self) -> None:
        self.fetches: dict[int, tuple[int, int]] = {}
        self.offloads: dict[int, bool] = {}
        self.loads: queue.SimpleQueue[bool] = queue.SimpleQueue()


class PipelineAgreement:
    """One rank's part of it. Runs on the scheduler's thread, at all stages at the same places in the same order."""

    def __init__(
        self, link: Link, smallest_of_ranks: Callable[[Sequence[int]], list[int]], on_news: Callable[[], None]
    ) -> None:
        """Nothing was agreed on yet.

        Args:
            link: to the other stages.
            smallest_of_ranks: number by number, the smallest of what the ranks of this stage give at once.
            on_news: called at the first stage, on any thread, when another has reported something.
        """
        self._link = link
        self._smallest_of_ranks = smallest_of_ranks
        self._on_news = on_news
        self._told_fetches: dict[int, tuple[int, int]] = {}
        self._told_offloads = 0
        self._lock = threading.Lock()
        self._heard = [_Heard() for _ in range(1, link.stages)]
        if self._is_first:
            link.listen(self._hear)

    @property
    def _is_first(self) -> bool:
        return self._link.stage == 0

    def agree(
        self, fetches: Sequence[Fetch], first_offload: int, offloads: Sequence[bool]
    ) -> tuple[list[int], list[bool]]:
        """Once per scheduling pass in which any request waits or any offload is under way.

        Args:
            fetches: of all requests that wait and whose pages were not agreed on.
            first_offload: how many offloads were agreed on before.
            offloads: whether those that come next, and are over here, have succeeded.

        Returns:
            Of each fetch the pages that all stages have, or :data:`NOT_YET`; and, of the next offloads that are over at
            all stages, whether they have succeeded at all of them.
        """
        if not self._is_first:
            self._report_fetches(fetches)
            self._report_offloads(first_offload, offloads)
            count, *pages = self._link.decision(1 + len(fetches))
            return pages, [bool(success) for success in self._link.decision(count)] if count else []
        with self._lock:
            numbers = [self._over_everywhere(first_offload, offloads)]
            for fetch in fetches:
                said = [heard.fetches.get(fetch.number, (NOT_YET, _MOST)) for heard in self._heard]
                numbers.append(min([fetch.pages, *(pages for pages, _ in said)]))
                numbers.append(min([fetch.most_pages, *(most for _, most in said)]))
        count, *numbers = self._smallest_of_ranks(numbers)
        # Where a stage will have none, the others need not wait for theirs.
        pages = [0 if most == 0 else ready for ready, most in zip(numbers[::2], numbers[1::2], strict=True)]
        self._link.decide([count, *pages])
        successes: list[bool] = []
        if count:
            with self._lock:
                mine = [
                    offloads[index] and all(heard.offloads[first_offload + index] for heard in self._heard)
                    for index in range(count)
                ]
            successes = [bool(success) for success in self._smallest_of_ranks([int(each) for each in mine])]
            self._link.decide([int(success) for success in successes])
        self._forget(fetches, first_offload + count)
        return pages, successes

    def report_load(self, landed: bool) -> None:
        """Says whether the restores of the pass that was just launched here have landed; before its output leaves."""
        if not self._is_first:
            self._link.report(_LOAD, [int(landed)])

    def judge_load(self, landed: bool) -> bool:
        """Whether those of the oldest pass that was not judged have landed at all stages; ``landed`` if here.

        Called when the pass's output has come back from the last stage, by when all have reported.

        Raises:
            RuntimeError: another stage has not, in :data:`VERDICT_S`.
        """
        if not self._is_first:
            return bool(self._link.decision(1)[0])
        try:
            verdicts = [heard.loads.get(timeout=VERDICT_S) for heard in self._heard]
        except queue.Empty:
            raise RuntimeError(f"kvcodec: a stage has said nothing of a load for {VERDICT_S} s") from None
        landed = landed and all(verdicts)
        self._link.decide([int(landed)])
        return landed

    def close(self) -> None:
        """The server ends, at all stages."""
        self._link.close()

    # ---- at the first stage ----

    def _hear(self, stage: int, kind: int, numbers: list[int]) -> None:
        heard = self._heard[stage - 1]
        with self._lock:
            if kind == _FETCHES:
                for number, pages, most_pages in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
                    heard.fetches[number] = pages, most_pages
            elif kind == _OFFLOADS:
                heard.offloads.update((numbers[0] + index, bool(each)) for index, each in enumerate(numbers[1:]))
            else:
                heard.loads.put(bool(numbers[0]))
        self._on_news()

    def _over_everywhere(self, first: int, offloads: Sequence[bool]) -> int:
        for index in range(len(offloads)):
            if any(first + index not in heard.offloads for heard in self._heard):
                return index
        return len(offloads)

    def _forget(self, fetches: Sequence[Fetch], settled_offloads: int) -> None:
        """What was agreed on, or nobody waits for. The others hear of a request after the first stage has."""
        waiting = {fetch.number for fetch in fetches}
        with self._lock:
            for heard in self._heard:
                heard.fetches = {number: each for number, each in heard.fetches.items() if number in waiting}
                heard.offloads = {number: each for number, each in heard.offloads.items() if number >= settled_offloads}

    # ---- at the others ----

    def _report_fetches(self, fetches: Sequence[Fetch]) -> None:
        now = {fetch.number: (fetch.pages, fetch.most_pages) for fetch in fetches}
        news = [(number, *each) for number, each in now.items() if self._told_fetches.get(number) != each]
        self._told_fetches = now
        each_frame = MOST_REPORTED // 3
        for start in range(0, len(news), each_frame):
            self._link.report(_FETCHES, [number for row in news[start : start + each_frame] for number in row])

    def _report_offloads(self, first: int, offloads: Sequence[bool]) -> None:
        told = max(self._told_offloads, first)
        self._told_offloads = first + len(offloads)
        while told < self._told_offloads:
            some = offloads[told - first : told - first + MOST_REPORTED - 1]
            self._link.report(_OFFLOADS, [told, *map(int, some)])
            told += len(some)


@dataclasses.dataclass
class _Load:
    """Of one forward pass.

    Attributes:
        reqs: the requests whose pages it has restored.
        were_barred: whether each was kept out of the tree anyway.
        landed: whether all of it has landed here.
    """

    reqs: list[Any]
    were_barred: list[bool]
    landed: bool


class UnjudgedLoads:
    """Loads of passes that other stages have not come to yet. Until they have, nothing of them gets into the tree.

    A prompt's next chunk may be launched meanwhile; what it computes is kept out as well.
    """

    def __init__(self, agreement: PipelineAgreement) -> None:
        """None."""
        self._agreement = agreement
        self._loads: collections.deque[_Load] = collections.deque()

    def __bool__(self) -> bool:
        return bool(self._loads)

    def launched(self, reqs: Sequence[Any], landed: bool) -> None:
        """A pass that restores pages of these requests was launched here, and its restores are over."""
        self._loads.append(_Load(list(reqs), [req.skip_radix_cache_insert for req in reqs], landed))
        for req in reqs:
            req.skip_radix_cache_insert = True
        self._agreement.report_load(landed)

    def judge(self, reqs: Sequence[Any]) -> tuple[list[Any], bool]:
        """A pass of these requests is over at all stages.

        Returns:
            Those of them whose pages it has restored, and whether that has succeeded at all stages.
        """
        if not self._loads or not any(req in self._loads[0].reqs for req in reqs):
            return [], True
        load = self._loads.popleft()
        landed = self._agreement.judge_load(load.landed)
        for req, was_barred in zip(load.reqs, load.were_barred, strict=True):
            req.skip_radix_cache_insert = was_barred or not landed
        return load.reqs, landed
