"""What every storage engine must do, as tests. A new engine is one subclass with one fixture.

Needs pytest and hypothesis (the ``dev`` extra). For readable failures, before the import:
``pytest.register_assert_rewrite("sglang_kvcodec.testing.storage")``.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_kvcodec.errors import CapacityError, StorageUnavailableError
from sglang_kvcodec.storage.base import StorageEngine, StoreStat

EngineFactory = Callable[[int], StorageEngine]
"""Capacity in bytes -> a new, empty engine."""

_THREADS = 4


def make_key(name: object) -> bytes:
    """A key of 64 bytes, different for every name."""
    return hashlib.sha512(repr(name).encode()).digest()


def make_value(name: object, size_bytes: int) -> bytes:
    """``size_bytes`` bytes that no other name gets (from a few bytes on), so that a mixed-up object shows."""
    return random.Random(repr(name)).randbytes(size_bytes)


class LruModel:
    """What an engine must hold after the same calls, written as plainly as possible."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.objects: OrderedDict[bytes, bytes] = OrderedDict()
        self.evicted_objects = 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of all objects."""
        return sum(map(len, self.objects.values()))

    def use(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The objects of a read of ``keys``."""
        for key in reversed(keys):
            if key in self.objects:
                self.objects.move_to_end(key)
        return [self.objects.get(key) for key in keys]

    def put(self, key: bytes, value: bytes) -> bool:
        """A put that fits the capacity."""
        if self.use([key])[0] is not None:
            return False
        self.objects[key] = value
        while self.stored_bytes > self.capacity_bytes:
            # The new object is the last one, and fits alone.
            self.objects.popitem(last=False)
            self.evicted_objects += 1
        return True

    def stat(self) -> StoreStat:
        """The counts."""
        return StoreStat(len(self.objects), self.stored_bytes, self.capacity_bytes, self.evicted_objects)


_MODEL_CAPACITY_BYTES = 100
_KEYS = [make_key(i) for i in range(8)]
_a_key = st.sampled_from(_KEYS)
_operations = st.lists(
    st.one_of(
        st.tuples(st.just("put"), _a_key, st.integers(0, _MODEL_CAPACITY_BYTES + 5)),
        st.tuples(st.just("put"), _a_key, st.integers(15, 35)),
        st.tuples(st.just("get"), _a_key, st.none()),
        st.tuples(st.just("delete"), _a_key, st.none()),
        st.tuples(st.just("sizes"), st.lists(_a_key, max_size=6), st.none()),
    ),
    max_size=40,
)


class StorageEngineContract:
    """Subclass it as ``Test...`` and define the fixture ``make_engine``."""

    @pytest.fixture
    def make_engine(self) -> EngineFactory:
        """Makes new, empty engines; closes them after the test."""
        raise NotImplementedError("define the fixture make_engine")

    def test_absent_objects(self, make_engine: EngineFactory) -> None:
        """What was never put is not there."""
        engine = make_engine(1000)
        assert engine.name
        assert engine.get(make_key("a")) is None
        assert engine.sizes([]) == []
        assert engine.sizes([make_key("a"), make_key("b")]) == [None, None]
        assert engine.delete(make_key("a")) is False
        assert engine.stat() == StoreStat(0, 0, 1000, 0)

    @pytest.mark.parametrize("size_bytes", [0, 1, 4079, 4096, 65_537, 3_000_001])
    def test_objects_come_back_whole(self, make_engine: EngineFactory, size_bytes: int) -> None:
        """Of any size, up to exactly the capacity."""
        engine = make_engine(max(size_bytes, 1))
        value = make_value("a", size_bytes)
        assert engine.put(make_key("a"), value) is True
        assert engine.get(make_key("a")) == value
        assert engine.sizes([make_key("b"), make_key("a"), make_key("a")]) == [None, size_bytes, size_bytes]
        assert engine.stat() == StoreStat(1, size_bytes, max(size_bytes, 1), 0)

    @pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (4095, 4097), (99_999, 100_003), (5, 200_000)])
    def test_parts_of_an_object(self, make_engine: EngineFactory, start: int, stop: int) -> None:
        """As of a slice of bytes; what was read stays as it is when the object has gone."""
        engine = make_engine(200_000)
        value = make_value("a", 100_003)
        assert engine.get_range(make_key("a"), start, stop) is None
        engine.put(make_key("a"), value)
        part = engine.get_range(make_key("a"), start, stop)
        engine.delete(make_key("a"))
        engine.put(make_key("b"), make_value("b", 100_003))
        assert part == value[start:stop]

    def test_many_parts_in_a_row(self, make_engine: EngineFactory) -> None:
        """Like single ones; what is read is there until the block ends, whatever others delete."""
        engine = make_engine(200_000)
        for name in "ab":
            engine.put(make_key(name), make_value(name, 70_001))
        with engine.ranges() as get_range:
            parts = [get_range(make_key(name), 4095, 70_013) for name in "bab"]
            assert get_range(make_key("c"), 0, 1) is None
            assert get_range(make_key("a"), 70_001, 70_002) == b""
            deleter = threading.Thread(target=engine.delete, args=(make_key("b"),))
            deleter.start()
            deleter.join()
            assert parts == [make_value(name, 70_001)[4095:] for name in "bab"]
        with engine.ranges() as get_range:
            assert get_range(make_key("b"), 0, 1) is None

    def test_reading_a_part_is_no_use(self, make_engine: EngineFactory) -> None:
        """The order of use stays that of the calls that name whole prefixes."""
        engine = make_engine(20)
        for name in "ab":
            engine.put(make_key(name), make_value(name, 10))
        assert engine.get_range(make_key("a"), 0, 5) == make_value("a", 10)[:5]
        engine.put(make_key("c"), make_value("c", 10))
        assert engine.sizes([make_key(name) for name in "abc"]) == [None, 10, 10]

    def test_the_time_of_the_put(self, make_engine: EngineFactory) -> None:
        """Is known beside the size, stays, and asking for either is no use."""
        engine = make_engine(30)
        before_s = time.time()
        for name in "abc":
            engine.put(make_key(name), bytes(10))
        engine.put(make_key("c"), bytes(10))
        stored_at_s = engine.stored_at_s([make_key(name) for name in "axbc"])
        assert stored_at_s[1] is None
        assert [found and found.size_bytes for found in engine.peek([make_key("x"), make_key("b")])] == [None, 10]
        # A store has a clock of its own, and some count in whole seconds.
        assert all(at is not None and before_s - 2 < at < time.time() + 2 for at in (stored_at_s[0], *stored_at_s[2:]))
        engine.get(make_key("b"))
        engine.stored_at_s([make_key("a")])
        engine.put(make_key("d"), bytes(10))
        assert engine.stored_at_s([make_key("b"), make_key("a")]) == [stored_at_s[2], None]

    def test_all_keys(self, make_engine: EngineFactory) -> None:
        """Listed once each while nothing changes, without marking them as used; changes do no harm."""
        count = 2_503
        engine = make_engine(count)
        assert list(engine.key_batches()) == []
        for i in range(count):
            engine.put(make_key(i), b"x")
        batches = list(engine.key_batches())
        assert len(batches) > 1
        assert sorted(key for batch in batches for key in batch) == sorted(make_key(i) for i in range(count))
        engine.put(make_key("new"), b"x")
        assert engine.sizes([make_key(0), make_key(1)]) == [None, 1]
        walk = engine.key_batches()
        listed = set(next(walk))
        gone = {make_key(i) for i in range(0, count, 3)}
        for key in gone:
            engine.delete(key)
        listed.update(key for batch in walk for key in batch)
        assert listed >= {make_key(i) for i in range(1, count)} - gone

    def test_tidying_an_orderly_store(self, make_engine: EngineFactory) -> None:
        """Changes nothing that can be seen."""
        engine = make_engine(100)
        for name in "abcd":
            engine.put(make_key(name), make_value(name, 30))
        engine.delete(make_key("c"))
        engine.tidy()
        assert engine.stat() == StoreStat(2, 60, 100, 1)
        assert [engine.get(make_key(name)) for name in "abcd"] == [
            make_value(name, 30) if name in "bd" else None for name in "abcd"
        ]

    def test_an_object_that_is_there_is_left(self, make_engine: EngineFactory) -> None:
        """The second put changes nothing, whatever it brings."""
        engine = make_engine(1000)
        assert engine.put(make_key("a"), b"first") is True
        assert engine.put(make_key("a"), b"second, and longer") is False
        assert engine.get(make_key("a")) == b"first"
        assert engine.stat() == StoreStat(1, 5, 1000, 0)

    def test_too_large_for_the_store(self, make_engine: EngineFactory) -> None:
        """An object above the capacity evicts nothing."""
        engine = make_engine(100)
        engine.put(make_key("a"), bytes(60))
        with pytest.raises(CapacityError):
            engine.put(make_key("b"), bytes(101))
        assert engine.sizes([make_key("a"), make_key("b")]) == [60, None]
        assert engine.stat() == StoreStat(1, 60, 100, 0)

    def test_delete(self, make_engine: EngineFactory) -> None:
        """A deleted object is gone, leaves room, is not counted as evicted, and may be put again."""
        engine = make_engine(100)
        engine.put(make_key("a"), bytes(60))
        engine.put(make_key("b"), bytes(40))
        assert engine.delete(make_key("a")) is True
        assert engine.delete(make_key("a")) is False
        assert engine.get(make_key("a")) is None
        assert engine.stat() == StoreStat(1, 40, 100, 0)
        assert engine.put(make_key("a"), b"again") is True
        assert engine.sizes([make_key("a"), make_key("b")]) == [5, 40]

    def test_the_least_recently_put_goes_first(self, make_engine: EngineFactory) -> None:
        """And no more of them than needed."""
        engine = make_engine(100)
        for name in "abc":
            engine.put(make_key(name), bytes(30))
        engine.put(make_key("d"), bytes(50))
        assert engine.sizes([make_key(name) for name in "abcd"]) == [None, None, 30, 50]
        assert engine.stat() == StoreStat(2, 80, 100, 2)

    @pytest.mark.parametrize("use", ["get", "sizes", "put"])
    def test_use_protects(self, make_engine: EngineFactory, use: str) -> None:
        """What was read, looked up or put once more outlives what was not."""
        engine = make_engine(90)
        for name in "abc":
            engine.put(make_key(name), bytes(30))
        if use == "get":
            engine.get(make_key("a"))
        elif use == "sizes":
            engine.sizes([make_key("a")])
        else:
            engine.put(make_key("a"), bytes(30))
        engine.put(make_key("d"), bytes(30))
        assert engine.sizes([make_key(name) for name in "abcd"]) == [30, None, 30, 30]

    def test_the_tail_of_a_prefix_goes_first(self, make_engine: EngineFactory) -> None:
        """Of keys used in one call the first ones count as used last."""
        engine = make_engine(40)
        for name in "abcd":
            engine.put(make_key(name), bytes(10))
        engine.sizes([make_key(name) for name in "abcd"])
        engine.put(make_key("e"), bytes(20))
        assert engine.sizes([make_key(name) for name in "abcde"]) == [10, 10, None, None, 20]

    @settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
    @given(operations=_operations)
    def test_any_calls(self, make_engine: EngineFactory, operations: list[tuple[str, object, object]]) -> None:
        """After any sequence of calls the engine holds what the model holds, and never more than its capacity."""
        # The fixture is shared by all examples; each makes an engine of its own.
        engine = make_engine(_MODEL_CAPACITY_BYTES)
        model = LruModel(_MODEL_CAPACITY_BYTES)
        for step, (verb, argument, size_bytes) in enumerate(operations):
            if verb == "sizes":
                assert isinstance(argument, list)
                expected = [None if value is None else len(value) for value in model.use(argument)]
                assert engine.sizes(argument) == expected
            else:
                assert isinstance(argument, bytes)
                self._check_one(engine, model, verb, argument, make_value(step, int(str(size_bytes or 0))))
            assert engine.stat() == model.stat()
            assert engine.stat().stored_bytes <= _MODEL_CAPACITY_BYTES
        assert [engine.get(key) for key in _KEYS] == [model.objects.get(key) for key in _KEYS]

    def _check_one(self, engine: StorageEngine, model: LruModel, verb: str, key: bytes, value: bytes) -> None:
        if verb == "get":
            assert engine.get(key) == model.use([key])[0]
        elif verb == "delete":
            assert engine.delete(key) == (model.objects.pop(key, None) is not None)
        elif len(value) > model.capacity_bytes:
            with pytest.raises(CapacityError):
                engine.put(key, value)
        else:
            assert engine.put(key, value) == model.put(key, value)

    def test_two_puts_of_one_key_at_once(self, make_engine: EngineFactory) -> None:
        """Exactly one of them stores, and what is there is that one's."""
        engine = make_engine(1 << 20)
        rounds = 20
        barrier = threading.Barrier(2)
        outcomes: list[list[bool]] = [[], []]

        def put_all(side: int) -> None:
            for i in range(rounds):
                barrier.wait(timeout=60)
                outcomes[side].append(engine.put(make_key(i), make_value((side, i), 5000)))

        _run_threads([lambda side=side: put_all(side) for side in range(2)])  # type: ignore[misc]
        for i in range(rounds):
            assert sorted([outcomes[0][i], outcomes[1][i]]) == [False, True]
            winner = 0 if outcomes[0][i] else 1
            assert engine.get(make_key(i)) == make_value((winner, i), 5000)
        assert engine.stat() == StoreStat(rounds, rounds * 5000, 1 << 20, 0)

    def test_reads_while_others_put_and_evict(self, make_engine: EngineFactory) -> None:
        """A reader gets an object whole or not at all, and the counts agree in the end."""
        capacity_bytes = 50_000
        engine = make_engine(capacity_bytes)
        keys, rounds = 24, 60

        def work(thread: int) -> None:
            choose = random.Random(thread)
            for _ in range(rounds):
                i = choose.randrange(keys)
                engine.put(make_key(i), make_value(i, 1000 + 333 * i))
                j = choose.randrange(keys)
                value = engine.get(make_key(j))
                assert value is None or value == make_value(j, 1000 + 333 * j)
                sizes = engine.sizes([make_key(k) for k in range(keys)])
                assert sum(size or 0 for size in sizes) <= capacity_bytes
                if choose.random() < 0.1:
                    engine.delete(make_key(i))

        _run_threads([lambda thread=thread: work(thread) for thread in range(_THREADS)])  # type: ignore[misc]
        values = [engine.get(make_key(i)) for i in range(keys)]
        held = [value for value in values if value is not None]
        stat = engine.stat()
        assert (stat.objects, stat.stored_bytes) == (len(held), sum(map(len, held)))
        assert 0 < stat.stored_bytes <= capacity_bytes

    def test_a_smaller_and_a_larger_capacity(self, make_engine: EngineFactory) -> None:
        """What is over a smaller one goes, the least recently used first; a larger one holds more, without loss."""
        engine = make_engine(50)
        for name in "abcde":
            engine.put(make_key(name), make_value(name, 10))
        engine.get(make_key("b"))
        engine.resize(25)
        assert engine.sizes([make_key(name) for name in "ebacd"]) == [10, 10, None, None, None]
        assert engine.stat() == StoreStat(2, 20, 25, 3)
        with pytest.raises(CapacityError):
            engine.put(make_key("f"), bytes(26))
        large_bytes = 600 << 10
        engine.resize(20 + 2 * large_bytes)
        for name in "gh":
            engine.put(make_key(name), make_value(name, large_bytes))
        assert [engine.get(make_key(name)) for name in "beg"] == [
            make_value("b", 10),
            make_value("e", 10),
            make_value("g", large_bytes),
        ]
        assert engine.stat() == StoreStat(4, 20 + 2 * large_bytes, 20 + 2 * large_bytes, 3)

    def test_resized_while_others_use_it(self, make_engine: EngineFactory) -> None:
        """Nobody notices, and the last bound holds."""
        engine = make_engine(1 << 20)
        engine.put(make_key(0), make_value(0, 1000))
        stopping = threading.Event()

        def work() -> None:
            numbers = iter(range(1, 1 << 30))
            while not stopping.is_set():
                engine.put(make_key((threading.get_ident(), next(numbers))), bytes(500))
                assert engine.get(make_key(0)) == make_value(0, 1000)
                with engine.ranges() as get_range:
                    part = get_range(make_key(0), 0, 1000)
                    assert part is not None
                    assert bytes(part) == make_value(0, 1000)

        def resize() -> None:
            try:
                for step in range(12):
                    engine.resize((1 << 20) << step % 4)
            finally:
                stopping.set()

        _run_threads([work] * _THREADS, meanwhile=resize)
        assert engine.stat().capacity_bytes == 8 << 20

    def test_close_while_others_use_it(self, make_engine: EngineFactory) -> None:
        """They finish what they do, or are told that the store is closed."""
        engine = make_engine(1 << 20)
        engine.put(make_key(0), make_value(0, 100_000))
        started = threading.Barrier(_THREADS + 1)

        def work() -> None:
            started.wait(timeout=60)
            try:
                while True:
                    assert engine.get(make_key(0)) == make_value(0, 100_000)
                    engine.put(make_key(threading.get_ident()), b"x")
            except StorageUnavailableError:
                pass

        _run_threads([work] * _THREADS, meanwhile=lambda: (started.wait(timeout=60), engine.close()))

    def test_closed(self, make_engine: EngineFactory) -> None:
        """Closing twice is fine; using it afterwards is refused."""
        engine = make_engine(1000)
        engine.put(make_key("a"), b"value")
        engine.close()
        engine.close()
        for use in (
            lambda: engine.get(make_key("a")),
            lambda: engine.get_range(make_key("a"), 0, 1),
            lambda: engine.sizes([make_key("a")]),
            lambda: engine.put(make_key("b"), b"value"),
            lambda: engine.delete(make_key("a")),
            engine.stat,
            lambda: engine.resize(1),
            lambda: engine.peek([make_key("a")]),
            lambda: list(engine.key_batches()),
            lambda: _read_in_a_row(engine),
        ):
            with pytest.raises(StorageUnavailableError):
                use()


def _read_in_a_row(engine: StorageEngine) -> None:
    with engine.ranges() as get_range:
        get_range(make_key("a"), 0, 1)


def _run_threads(bodies: Sequence[Callable[[], object]], meanwhile: Callable[[], object] = lambda: None) -> None:
    """Runs every body in a thread of its own and ``meanwhile`` in this one; raises the first failure."""
    failures: list[BaseException] = []

    def run(body: Callable[[], object]) -> None:
        try:
            body()
        except BaseException as error:  # reported below, in the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    meanwhile()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]
