"""Damaged objects are found and dropped before anyone asks for them; all others are left as they are."""

import contextlib
import threading
import time

import pytest

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.errors import StorageUnavailableError, UnknownFormatError
from sglang_kvcodec.format.page_object import MAGIC, PageObject
from sglang_kvcodec.rpc.scrub import Scrubber
from sglang_kvcodec.storage import FaultyEngine
from sglang_kvcodec.storage.memory import MemoryEngine

FAST = 10**12


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never happens"
        time.sleep(0.01)


def damaged(reason):
    return peer_metrics.STORE_DAMAGED.labels(reason)._value.get()


def passes():
    return peer_metrics.STORE_SCRUB_PASSES._value.get()


@contextlib.contextmanager
def one_pass(engine):
    before = passes()
    with contextlib.closing(Scrubber(engine, FAST)):
        until(lambda: passes() > before)
        yield


@pytest.fixture
def stored(namespace, page):
    """An engine with five pages, and their keys."""
    engine = MemoryEngine(1 << 30)
    keys = []
    for name in range(5):
        page_hash, data = page(name)
        engine.put(namespace + page_hash, data)
        keys.append(namespace + page_hash)
    return engine, keys


def replace(engine, key, data):
    engine.delete(key)
    engine.put(key, bytes(data))


@pytest.mark.parametrize("position", [0, 40, 1000, -1, -70_000])
def test_a_changed_byte(stored, position):
    engine, keys = stored
    data = bytearray(engine.get(keys[2]))
    data[position] ^= 0x40
    replace(engine, keys[2], data)
    with one_pass(engine):
        assert [size is not None for size in engine.sizes(keys)] == [True, True, False, True, True]


def test_an_object_of_a_later_format_is_left(stored):
    engine, keys = stored
    data = bytearray(engine.get(keys[2]))
    data[len(MAGIC)] += 1
    replace(engine, keys[2], data)
    with pytest.raises(UnknownFormatError, match="version"):
        PageObject(bytes(data))
    with one_pass(engine):
        assert None not in engine.sizes(keys)


def test_every_kind_of_damage_is_counted(stored, namespace, page):
    engine, keys = stored
    data = engine.get(keys[1])
    replace(engine, keys[1], data[:-1])
    replace(engine, keys[2], data)  # another page's
    flipped = bytearray(engine.get(keys[3]))
    flipped[-1] ^= 1
    replace(engine, keys[3], flipped)
    engine.put(b"no page's key", b"x")
    before = {reason: damaged(reason) for reason in ("truncated", "foreign_page", "checksum")}
    with one_pass(engine):
        assert [size is not None for size in engine.sizes(keys)] == [True, False, False, False, True]
    assert engine.stat().objects == 2
    assert {reason: damaged(reason) - count for reason, count in before.items()} == {
        "truncated": 1,
        "foreign_page": 2,
        "checksum": 1,
    }


def test_scrubbing_is_no_use(stored):
    engine, _ = stored
    order = [key for batch in engine.key_batches() for key in batch]
    with one_pass(engine):
        assert [key for batch in engine.key_batches() for key in batch] == order


def test_the_rate_is_a_bound(stored):
    """At one byte a second it is still at the first object when it is closed."""
    engine, _ = stored
    read, started = [], threading.Event()
    faulty = FaultyEngine(engine)

    def before(method, keys):
        if method == "get_range":
            read.extend(keys)
            started.set()

    faulty.set_faults(before)
    scrubber = Scrubber(faulty, 1)
    assert started.wait(60)
    scrubber.close()
    assert len(read) == 1


def test_without_a_rate_the_engine_is_only_tidied(stored):
    engine, _ = stored
    calls = []
    faulty = FaultyEngine(engine)
    faulty.set_faults(lambda method, keys: calls.append(method))
    tidied = threading.Event()
    faulty.tidy = tidied.set
    with contextlib.closing(Scrubber(faulty, 0)):
        assert tidied.wait(60)
    assert calls == []


def test_an_engine_that_fails_is_tried_again(stored):
    engine, keys = stored
    flipped = bytearray(engine.get(keys[4]))
    flipped[-1] ^= 1
    replace(engine, keys[4], flipped)
    failures = iter([StorageUnavailableError("gone"), RuntimeError("a bug"), None])
    faulty = FaultyEngine(engine)

    def before(method, keys):
        if method == "key_batches" and (failure := next(failures, None)) is not None:
            raise failure

    faulty.set_faults(before)
    with contextlib.closing(Scrubber(faulty, FAST, pause_s=0.01)):
        until(lambda: engine.sizes([keys[4]]) == [None])


def test_a_new_rate_counts_at_once(stored):
    """It ends the pause between two walks, and the one within a walk that would take hours."""
    engine, keys = stored
    replace(engine, keys[-1], b"damaged")
    walking = threading.Event()
    faulty = FaultyEngine(engine)
    faulty.set_faults(lambda method, keys: walking.set() if method == "get_range" else None)
    before = passes()
    with contextlib.closing(Scrubber(faulty, 0)) as scrubber:
        assert not walking.wait(0.1)
        scrubber.set_rate(1)
        assert walking.wait(60)
        scrubber.set_rate(FAST)
        until(lambda: passes() > before)
    assert engine.peek(keys[-1:]) == [None]


def test_a_rate_of_nothing_ends_a_walk(stored):
    engine, _ = stored
    walking = threading.Event()
    read = []
    faulty = FaultyEngine(engine)

    def before(method, keys):
        if method == "get_range":
            read.extend(keys)
            walking.set()

    faulty.set_faults(before)
    with contextlib.closing(Scrubber(faulty, 1)) as scrubber:
        assert walking.wait(60)
        scrubber.set_rate(0)
    assert len(read) == 1
