"""Pages on their way to the peer: the host memory that they hold, and the turns in which they are encoded."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping

import torch

from sglang_kvcodec import metrics
from sglang_kvcodec.flow.page_codec import PackedPage
from sglang_kvcodec.flow.turn_queue import TurnQueue
from sglang_kvcodec.format.spec import Side

TURN_S_PER_TIER = 5.0
"""So much later is the turn of a page for each tier that is better than its own."""
TURN_S_PER_TOKEN = 1e-3
"""So much later is the turn of a page for each token before it: about what it takes to code one."""

PageContent = Mapping[Side, torch.Tensor] | PackedPage
"""What an encoder takes of a page: its values, or what was packed of them."""


@dataclasses.dataclass(frozen=True)
class UncodedPage:
    """A page that waits for an encoder.

    Attributes:
        namespace_digest: where it will be stored.
        page_hash: under which name.
        content: to encode.
        held_bytes: of the queue.
        first_position: of its first token.
        is_best: whether it is of the best tier.
    """

    namespace_digest: bytes
    page_hash: bytes
    content: PageContent
    held_bytes: int
    first_position: int
    is_best: bool


@dataclasses.dataclass(frozen=True)
class CodedPage:
    """A page that waits to be stored.

    Attributes:
        namespace_digest: where it will be.
        page_hash: under which name.
        coded: its page object.
        held_bytes: of the queue.
        is_best: whether it is of the best tier.
    """

    namespace_digest: bytes
    page_hash: bytes
    coded: bytes
    held_bytes: int
    is_best: bool


def count_dropped(pages: int, reason: str) -> None:
    """So many pages will not be published."""
    metrics.PUBLISH_DROPS.labels(reason=reason).inc(pages)


def _turn_s(first_position: int, tier: int) -> float:
    """The turn of a page, from now on, among those that wait for an encoder; the least is first.

    The nearer to the start of its prompt, the more other prompts may begin as well with what ends in it; and a page is
    of no use without those before it. A later one waits for its turn, not for ever; so does one of a smaller tier.
    """
    return time.monotonic() + first_position * TURN_S_PER_TOKEN + tier * TURN_S_PER_TIER


class PublishQueue:
    """Bounds what is held from when pages are offloaded until they are stored, and orders those not yet encoded.

    Thread-safe. Room is reserved before pages are copied, and released by whoever has done with them.
    """

    def __init__(self, bound_bytes: int) -> None:
        """Empty, with room for ``bound_bytes``."""
        self._bound_bytes = bound_bytes
        self._changed = threading.Condition()
        self._held_bytes = 0
        self._to_encode: TurnQueue[UncodedPage] = TurnQueue()
        """By their turns, see :func:`_turn_s`."""

    # ---- room ----

    def reserve(self, size_bytes: int) -> bool:
        """Makes room by dropping the pages that have waited longest; False if there is none even so."""
        with self._changed:
            # One offload larger than the bound is taken when nothing else is under way: else it never could be.
            bound_bytes = self._bound_bytes
            if self._held_bytes and self._held_bytes + size_bytes > bound_bytes:
                # Looked at one by one only where it is full: this runs on the scheduler's thread.
                fixed_bytes = self._held_bytes - sum(page.held_bytes for page in self._to_encode.waiting())
                if fixed_bytes and fixed_bytes + size_bytes > bound_bytes:
                    return False
            while self._held_bytes and self._held_bytes + size_bytes > bound_bytes:
                oldest = self._to_encode.drop_oldest()
                if oldest is None:
                    break
                count_dropped(1, "queue_full")
                self._held_bytes -= oldest.held_bytes
            self._held_bytes += size_bytes
            metrics.PUBLISH_QUEUE_BYTES.set(self._held_bytes)
            return True

    def resize(self, reserved_bytes: int, held_bytes: int) -> bool:
        """Has a page hold what it is instead of what it was taken for; False if it is more, and there is no room."""
        with self._changed:
            grown_bytes = held_bytes - reserved_bytes
            if grown_bytes > 0 and self._held_bytes + grown_bytes > self._bound_bytes:
                return False
            self._held_bytes += grown_bytes
            metrics.PUBLISH_QUEUE_BYTES.set(self._held_bytes)
            return True

    def release(self, size_bytes: int) -> None:
        """So much is not held any more."""
        with self._changed:
            self._held_bytes -= size_bytes
            metrics.PUBLISH_QUEUE_BYTES.set(self._held_bytes)
            self._changed.notify_all()

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Waits until nothing is held; for tests."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._held_bytes, timeout_s)

    # ---- what waits for an encoder ----

    def put(self, page: UncodedPage, tier: int) -> None:
        """Adds a page, which has its room already; ``tier`` is 0 for the best one."""
        self._to_encode.put(_turn_s(page.first_position, tier), page)

    def get(self) -> UncodedPage | None:
        """Waits for the page whose turn is next; None once the queue is closed and no page waits."""
        return self._to_encode.get()

    def waiting(self) -> list[UncodedPage]:
        """Those that wait, the oldest first."""
        return self._to_encode.waiting()

    def close(self) -> None:
        """No page will be added."""
        self._to_encode.close()
