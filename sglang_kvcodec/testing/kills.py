"""Kills a real peer with SIGKILL at random moments, again and again, and checks what it promised."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import threading
import time
from collections.abc import Callable

from sglang_kvcodec.config import Timeouts
from sglang_kvcodec.errors import PeerError
from sglang_kvcodec.format.exchange import FetchedHeader, FetchedMissing, PutOutcome
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import SideData, build_page_object
from sglang_kvcodec.format.spec import KVDtype, KVSpec, layer_groups
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.testing.peer import PeerProcess

_NAMESPACE = bytes(32)
_SPEC = KVSpec(layers=3, kv_heads=1, head_dim=64, page_tokens=8, dtype=KVDtype.BFLOAT16)
_TIMEOUTS = Timeouts(connect_s=20, lookup_s=20, progress_s=20)
_PAGES_PER_LOOKUP = 512


@dataclasses.dataclass
class KillReport:
    """What came of it.

    Attributes:
        kills: how many there were.
        acknowledged: objects whose Put was acknowledged.
        evicted: of those how many were no longer there, and had a reason not to be.
        unacknowledged_but_stored: objects of Puts that were cut off and yet there, whole.
        slowest_start_s: longest time from the start of a process to its first word.
    """

    kills: int = 0
    acknowledged: int = 0
    evicted: int = 0
    unacknowledged_but_stored: int = 0
    slowest_start_s: float = 0.0


def kill_again_and_again(
    process: PeerProcess,
    capacity_bytes: int,
    kills: int,
    seed: int,
    object_bytes: int = 60_000,
    held_bytes_per_kill: int = 0,
    on_kill: Callable[[KillReport], None] = lambda report: None,
) -> KillReport:
    """Puts objects of random sizes one after another, kills the peer meanwhile, starts it again and looks.

    After each start every stored object must be what was put, and the newest acknowledged ones must be there, as many
    as fit: a store may evict, but only the oldest, and only for what was put after them.

    Args:
        process: a running peer whose store outlives it.
        capacity_bytes: what it was given; several objects should fit, and it should get full.
        kills: how often.
        seed: of the sizes and moments.
        object_bytes: largest size of an object's payload.
        held_bytes_per_kill: room that a put which was cut off may hold for longer than this takes.
        on_kill: called after each.

    Raises:
        AssertionError: it did not keep what it promised.
    """
    source = random.Random(seed)
    report = KillReport()
    pages = _Pages(seed, object_bytes)
    acknowledged: set[int] = set()
    number = -1
    for _ in range(kills):
        client = GrpcPeer(process.remote, _TIMEOUTS)
        client.stat()  # connected, so that the moment falls into the puts
        killer = threading.Timer(source.uniform(0.0, 0.4), process.kill)
        killer.start()
        try:
            while True:
                number += 1
                (result,) = client.put(_NAMESPACE, [pages.make(number)])
                assert result.outcome is PutOutcome.STORED, result
                acknowledged.add(number)
        except PeerError:
            pass
        finally:
            killer.join()
            client.close()
        started_s = time.monotonic()
        process.restart()
        report.kills += 1
        report.slowest_start_s = max(report.slowest_start_s, time.monotonic() - started_s)
        client = GrpcPeer(process.remote, _TIMEOUTS)
        try:
            present = _look(client, pages, range(number + 1))
            must_fit_bytes = capacity_bytes - 2 * object_bytes - report.kills * held_bytes_per_kill
            _check(client, pages, present, acknowledged, must_fit_bytes)
            assert client.stat().stored_bytes <= capacity_bytes
        finally:
            client.close()
        report.acknowledged = len(acknowledged)
        report.evicted = len(acknowledged - present)
        report.unacknowledged_but_stored = len(present - acknowledged)
        on_kill(report)
    return report


class _Pages:
    """Page objects by number, the same ones whenever they are made."""

    def __init__(self, seed: int, object_bytes: int) -> None:
        self._seed = seed
        self._object_bytes = object_bytes

    def page_hash(self, number: int) -> bytes:
        return hashlib.sha256(f"{self._seed} {number}".encode()).digest()

    def make(self, number: int) -> tuple[bytes, bytes]:
        page_hash = self.page_hash(number)
        source = random.Random(page_hash)
        sizes = iter([source.randrange(self._object_bytes), 1])
        groups = [
            {side: SideData(stored=source.randbytes(next(sizes))) for side in _SPEC.sides} for _ in layer_groups(_SPEC)
        ]
        return page_hash, build_page_object(PageKey(_NAMESPACE, page_hash), _SPEC, "raw", groups)


def _look(client: GrpcPeer, pages: _Pages, numbers: range) -> set[int]:
    """Which are stored. Asks in an order that leaves the newest ones those that were used last."""
    present: set[int] = set()
    for first in range(0, len(numbers), _PAGES_PER_LOOKUP):
        part = numbers[first : first + _PAGES_PER_LOOKUP][::-1]
        found = client.lookup(_NAMESPACE, [pages.page_hash(number) for number in part]).present
        present.update(number for number, is_there in zip(part, found, strict=True) if is_there)
    return present


def _check(client: GrpcPeer, pages: _Pages, present: set[int], acknowledged: set[int], must_fit_bytes: int) -> None:
    newest_bytes = 0
    for number in sorted(present | acknowledged, reverse=True):
        newest_bytes += len(pages.make(number)[1])
        if newest_bytes > must_fit_bytes:
            break
        assert number in present, f"object {number} was acknowledged and is lost"
    stored_bytes = 0
    for number in sorted(present):
        page_hash, data = pages.make(number)
        assert _fetch(client, page_hash) == data, f"object {number} is not what was put"
        stored_bytes += len(data)
    stat = client.stat()
    assert (stat.objects, stat.stored_bytes) == (len(present), stored_bytes), f"{stat} counts wrong"


def _fetch(client: GrpcPeer, page_hash: bytes) -> bytes:
    data = bytearray()
    for event in client.fetch(_NAMESPACE, [page_hash]):
        if isinstance(event, FetchedHeader):
            data += event.header + bytes(event.object_bytes - len(event.header))
        elif not isinstance(event, FetchedMissing):
            data[event.offset : event.offset + len(event.data)] = event.data
    return bytes(data)
