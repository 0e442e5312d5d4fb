"""Ends fetches that computing has overtaken: soft time-outs of each phase, from what is known at that moment."""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from sglang_kvcodec.flow.prediction import Knowledge, Prefix, predict, predict_rest

logger = logging.getLogger(__name__)

LOOKUP = "lookup"
FIRST_BYTE = "first_byte"
PROGRESS = "progress"
SILENCE = "silence"
"""Why a fetch in :data:`PROGRESS` is given up of which hardly anything comes any more."""

PERIOD_S = 0.02
CUT_MARGIN = 0.1
"""A fetch has to be predicted slower than computing by this share."""
PATIENCE_SHARE = 0.05
"""And for so long, as a share of what computing takes: a link that pauses is not one that is gone."""
MIN_PATIENCE_S, MAX_PATIENCE_S = 0.02, 0.5
ANSWER_SHARE = 0.25
"""An answer may take this share of the prefill."""
MIN_ANSWER_S = 0.05
ROUND_TRIPS_OF_AN_ANSWER = 4
HEADER_SHARE = 0.1
"""The first message of a fetch carries the headers: some of all bytes, which a slow link needs time for."""
SILENCE_S, SILENCE_MESSAGES, SILENCE_SHARE = 0.1, 4, 0.25
"""A link is doubted that for so long, and for several messages' time, brings no more than this share of what it should:
one may have been on its way when it failed. That counts where there is something better to do than to wait."""
LOST_SHARE = 0.5
"""And for this share of what it would take to fetch once more what is lost then, about half of which is computed
meanwhile: should the link come back the next moment, no more than was waited for is lost."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """How far a fetch has come.

    Attributes:
        phase: :data:`LOOKUP`, :data:`FIRST_BYTE` or :data:`PROGRESS`.
        since_s: when it began.
        prefix: the pages that were planned; before that, none.
        received_bytes: of them.
        whole_pages: the unbroken prefix of them that is complete.
        is_promised: the request has been admitted, and all are needed: without the rest it is computed from its start.
        fewest_bytes: that would be left if it went on with another tier; None where there is none.
        last_block_bytes: of the block under way, if that is the last one; None if it is not.
        usual_bytes_per_s: that the link was known to bring in this phase.
        silence_s: how long hardly anything of that has arrived.
        may_turn: the request can be computed while the other end is fetched (``flow/turning.py``).
    """

    phase: str
    since_s: float
    prefix: Prefix
    received_bytes: int = 0
    whole_pages: int = 0
    is_promised: bool = False
    fewest_bytes: int | None = None
    last_block_bytes: int | None = None
    usual_bytes_per_s: float = 0.0
    silence_s: float = 0.0
    may_turn: bool = False

    @property
    def missing_bytes(self) -> int:
        """What has yet to arrive."""
        return max(0, sum(self.prefix.page_bytes) - self.received_bytes)

    @property
    def partial_bytes(self) -> int:
        """What has arrived of pages that are not complete, or stand behind one that is not."""
        return max(0, self.received_bytes - sum(self.prefix.page_bytes[: self.whole_pages]))


def is_doubted(stage: Stage, known: Knowledge) -> bool:
    """Whether hardly anything has come for so long that a request is better computed from where it is.

    That it can be is what this is for: then a false alarm costs little, and waiting is in vain if it is none.
    """
    if stage.phase != PROGRESS or not stage.may_turn or not stage.usual_bytes_per_s or known.prefill is None:
        return False
    # Each block begins with a round trip, and others on the link have their turns.
    several_s = SILENCE_MESSAGES * known.message_bytes / stage.usual_bytes_per_s
    usual_s = max(SILENCE_S, several_s) * (1 + len(known.others_bytes)) + 2 * known.round_trip_s
    return stage.silence_s >= max(usual_s, LOST_SHARE * stage.partial_bytes / stage.usual_bytes_per_s)


def patience_s(stage: Stage, known: Knowledge, now_s: float) -> float | None:
    """How much longer to wait for a fetch that gets no better; None to wait without asking again.

    Zero or less means that it is to be given up. While prefill is not known there is nothing to compare with.
    """
    if stage.is_promised and known.restore is not None:
        # What is queued is its own restore, too: counted twice, it would look slower than computing.
        known = dataclasses.replace(known, restore=dataclasses.replace(known.restore, queued_s=0.0))
    if known.prefill is None:
        return None
    prefix = stage.prefix
    if stage.phase != PROGRESS:
        prefill_s = known.prefill.seconds(max(1, prefix.prompt_tokens - prefix.tokens_before), prefix.tokens_before)
        allowed_s = max(MIN_ANSWER_S, ANSWER_SHARE * prefill_s, ROUND_TRIPS_OF_AN_ANSWER * known.round_trip_s)
        if known.bytes_per_s:
            allowed_s += HEADER_SHARE * stage.missing_bytes / known.bytes_per_s
        return stage.since_s + allowed_s - now_s
    if known.bytes_per_s is None:
        return None
    after_s = predict(prefix, known).after_s
    missing = stage.missing_bytes if stage.fewest_bytes is None else min(stage.missing_bytes, stage.fewest_bytes)
    rest = predict_rest(prefix, missing, known, 0.0, stage.last_block_bytes) if known.overlaps else None
    if rest is not None:
        # Of a request in a batch restore and forward pass are under way: only what is missing can make it late.
        keep_s = rest.landed_s if stage.is_promised else rest.first_token_s
    else:
        shared = missing + sum(min(missing, other) for other in known.others_bytes)
        keep_s = shared / max(known.bytes_per_s, 1e-9) + float(after_s[-1])
    # Its thread tells of another prefix and of what is there of it one after the other.
    cut_s = float(after_s[0 if stage.is_promised else min(stage.whole_pages, len(after_s) - 1)])
    if keep_s <= cut_s * (1 + CUT_MARGIN):
        return None
    return min(MAX_PATIENCE_S, max(MIN_PATIENCE_S, PATIENCE_SHARE * cut_s))


class Flight:
    """One fetch under watch. Its thread tells how far it is; the pacer reads it."""

    def __init__(self, stage: Stage, give_up: Callable[[str], None]) -> None:
        """A fetch that begins.

        Args:
            stage: where it is.
            give_up: called once with the phase, on the pacer's thread, when computing has overtaken it.
        """
        self._stage = stage
        self._received_bytes = 0
        self._whole_pages = 0
        self._is_promised = False
        self._fewest_bytes: int | None = None
        self._last_block_bytes: int | None = None
        self.profile_name = ""
        """Of the tier that is fetched; empty where there is one only."""
        self.may_turn = False
        """As of :class:`Stage`."""
        self.are_others = False
        """Whether others used the model when the request came."""
        self.queued_bytes = 0
        """What it will receive, while it is planned and no thread is free for it."""
        self.given_up_at_bytes_per_s: float | None = None
        """What the link brings at most, as it looked when this was given up; None if that was not known."""
        self._give_up = give_up
        self._moments: collections.deque[tuple[float, int]] = collections.deque()
        """When it was judged, and what had been received then: the first one of each number in this phase."""
        self._usual_bytes_per_s = 0.0
        """The most that the link was known to bring in this phase: it soon is what the link has become."""
        self._bad_since_s: float | None = None
        self._is_over = False

    @property
    def phase(self) -> str:
        """Of its :attr:`stage`."""
        return self._stage.phase

    @property
    def stage(self) -> Stage:
        """Where it is now."""
        return dataclasses.replace(
            self._stage,
            received_bytes=self._received_bytes,
            whole_pages=self._whole_pages,
            is_promised=self._is_promised,
            fewest_bytes=self._fewest_bytes,
            last_block_bytes=self._last_block_bytes,
            may_turn=self.may_turn,
        )

    @property
    def is_promised(self) -> bool:
        """Whether its request has been admitted."""
        return self._is_promised

    def promised(self) -> None:
        """Its request has been admitted."""
        self._is_promised = True

    def unwatched(self) -> None:
        """It is not given up from here: nobody waits for it. It still has its share of the link."""
        self._is_over = True

    def begin(self, phase: str, now_s: float, prefix: Prefix | None = None) -> None:
        """The next phase begins, with another prefix if one is given."""
        self._stage = Stage(phase, now_s, prefix or self._stage.prefix)
        self.queued_bytes = 0

    def progress(self, received_bytes: int, whole_pages: int, last_block_bytes: int | None = None) -> None:
        """So much has arrived, of all; the last argument as of :class:`Stage`."""
        if self._fewest_bytes is not None:
            self._fewest_bytes = max(0, self._fewest_bytes - max(0, received_bytes - self._received_bytes))
        self._received_bytes, self._whole_pages = received_bytes, whole_pages
        self._last_block_bytes = last_block_bytes

    def could_be(self, fewest_bytes: int) -> None:
        """So much would be left with the smallest tier."""
        self._fewest_bytes = fewest_bytes

    def judge(self, known: Knowledge, now_s: float) -> None:
        """Gives it up if it is due."""
        if self._is_over:
            return
        stage = self._listen(known, now_s)
        if is_doubted(stage, known):
            # At best it is what it looks like.
            self._end(SILENCE, stage.usual_bytes_per_s * SILENCE_SHARE)
            return
        left_s = patience_s(stage, known, now_s)
        if left_s is None:
            self._bad_since_s = None
            return
        if stage.phase == PROGRESS:
            self._bad_since_s = now_s if self._bad_since_s is None else self._bad_since_s
            left_s -= now_s - self._bad_since_s
        if left_s <= 0:
            self._end(stage.phase, known.bytes_per_s)

    def _listen(self, known: Knowledge, now_s: float) -> Stage:
        """Where it is, and how long it has hardly moved."""
        stage, moments = self.stage, self._moments
        if stage.phase != PROGRESS or (moments and moments[-1][1] > stage.received_bytes):
            moments.clear()
            self._usual_bytes_per_s = 0.0
        self._usual_bytes_per_s = max(self._usual_bytes_per_s, known.bytes_per_s or 0.0)
        if not moments or moments[-1][1] != stage.received_bytes:
            moments.append((now_s, stage.received_bytes))
        least_bytes_per_s = self._usual_bytes_per_s * SILENCE_SHARE / (1 + len(known.others_bytes))
        while len(moments) > 1 and stage.received_bytes - moments[0][1] > least_bytes_per_s * (now_s - moments[0][0]):
            moments.popleft()
        silence_s, usual_bytes_per_s = now_s - moments[0][0], self._usual_bytes_per_s
        return dataclasses.replace(stage, silence_s=silence_s, usual_bytes_per_s=usual_bytes_per_s)

    def _end(self, phase: str, bytes_per_s: float | None) -> None:
        self._is_over = True
        self.given_up_at_bytes_per_s = bytes_per_s
        self._give_up(phase)


class Pacer:
    """Knows the fetches under way, and watches them on one thread that sleeps while there are none."""

    def __init__(self, known: Callable[[str], Knowledge], is_watching: bool = True) -> None:
        """Starts with none.

        Args:
            known: what is known now of a profile, or of all together where it is empty, but for the other fetches.
            is_watching: whether to give any up whose request still waits. Those whose request is in a batch, where
                others wait with it, are watched in any case.
        """
        self._known = known
        self._is_watching = is_watching
        self._changed = threading.Condition()
        self._flights: list[Flight] = []
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def add(self, flight: Flight) -> None:
        """Watches a fetch until :meth:`remove`."""
        with self._changed:
            self._flights.append(flight)
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._run, name="kvcodec-pacer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def remove(self, flight: Flight) -> None:
        """It has ended."""
        with self._changed:
            self._flights.remove(flight)

    def knowledge(self, flight: Flight, profile_name: str | None = None) -> Knowledge:
        """What is known now, with what all others have yet to receive; of the flight's profile or another one."""
        with self._changed:
            flights = list(self._flights)
        known = self._known(flight.profile_name if profile_name is None else profile_name)
        return _beside(flight, known, _missing_bytes(flights))

    def close(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._flights)
                if self._is_closed:
                    return
                flights = list(self._flights)
            missing = _missing_bytes(flights)
            known: dict[str, Knowledge] = {}
            for flight in flights:
                if not self._is_watching and not flight.is_promised:
                    continue
                name = flight.profile_name
                if name not in known:
                    known[name] = self._known(name)
                try:
                    flight.judge(_beside(flight, known[name], missing), time.monotonic())
                except Exception:
                    # A thread's top, on which all other fetches hang.
                    logger.exception("kvcodec: a fetch can't be compared with computing")
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed, timeout=PERIOD_S)


def _missing_bytes(flights: Iterable[Flight]) -> dict[Flight, int]:
    """What each of those that receive, or will as soon as it is their turn, has yet to receive."""
    sizes = {
        flight: flight.queued_bytes if flight.phase == LOOKUP else flight.stage.missing_bytes for flight in flights
    }
    return {flight: size for flight, size in sizes.items() if size}


def _beside(flight: Flight, known: Knowledge, missing: Mapping[Flight, int]) -> Knowledge:
    """What is known, for one of the flights. One that receives shares the link with none that wait for their turn."""
    others_bytes = [
        size
        for other, size in missing.items()
        if other is not flight and (flight.phase == LOOKUP or other.phase != LOOKUP)
    ]
    return dataclasses.replace(known, others_bytes=others_bytes, are_others=flight.are_others)
