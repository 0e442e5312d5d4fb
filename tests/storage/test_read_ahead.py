import threading

import pytest

from sglang_kvcodec.errors import StorageUnavailableError
from sglang_kvcodec.storage import FaultyEngine, ReadAheadEngine
from sglang_kvcodec.storage.memory import MemoryEngine
from sglang_kvcodec.testing.storage import StorageEngineContract, make_key, make_value

KEYS = [make_key(i) for i in range(5)]
OBJECTS = [(key, 1000 + i) for i, key in enumerate(KEYS)]


class TestReadAheadEngine(StorageEngineContract):
    @pytest.fixture
    def make_engine(self):
        return lambda capacity_bytes: ReadAheadEngine(MemoryEngine(capacity_bytes))


@pytest.fixture
def inside():
    engine = FaultyEngine(MemoryEngine(1 << 20))
    for i, (key, size_bytes) in enumerate(OBJECTS):
        engine.put(key, make_value(i, size_bytes))
    return engine


@pytest.fixture
def reads(inside):
    """Keys that have been read from the engine inside."""
    keys = []

    def before(method, of):
        if method == "get_range":
            keys.extend(of)

    inside.set_faults(before)
    return keys


def part(i, start, stop):
    return make_value(i, 1000 + i)[start:stop]


def test_objects_are_read_at_once_and_only_once(inside, reads):
    together = threading.Barrier(len(KEYS))

    def before(method, keys):
        if method == "get_range":
            reads.extend(keys)
            together.wait(timeout=60)

    inside.set_faults(before)
    engine = ReadAheadEngine(inside)
    with engine.reading_ahead(OBJECTS):
        for start in (0, 500, 999, 2000):
            with engine.ranges() as get_range:
                for i, key in enumerate(KEYS):
                    assert get_range(key, start, start + 400) == part(i, start, start + 400)
                    assert engine.get_range(key, start, start + 7) == part(i, start, start + 7)
    assert sorted(reads) == sorted(KEYS)
    engine.close()


def test_two_readers_share_what_is_read(inside, reads):
    engine = ReadAheadEngine(inside)
    with engine.reading_ahead(OBJECTS[:3]):
        with engine.reading_ahead(OBJECTS[1:]):
            for i, key in enumerate(KEYS):
                assert engine.get_range(key, 1, 9) == part(i, 1, 9)
        assert engine.get_range(KEYS[1], 1, 9) == part(1, 1, 9)
        assert sorted(reads) == sorted(KEYS)
        assert engine.get_range(KEYS[4], 1, 9) == part(4, 1, 9)
        assert reads.count(KEYS[4]) == 2
    engine.close()


def test_the_bytes_held_are_bounded_and_given_back(inside, reads):
    engine = ReadAheadEngine(inside, most_bytes=2100)
    for _ in range(3):
        reads.clear()
        with engine.reading_ahead(OBJECTS):
            for start in (0, 1, 2):
                for i, key in enumerate(KEYS):
                    assert engine.get_range(key, start, start + 1) == part(i, start, start + 1)
        assert [reads.count(key) for key in KEYS] == [1, 1, 3, 3, 3]
    engine.close()


def test_what_has_gone_is_missing_and_what_is_deleted_goes(inside):
    engine = ReadAheadEngine(inside)
    inside.delete(KEYS[0])
    with engine.reading_ahead(OBJECTS):
        assert engine.get_range(KEYS[0], 0, 10) is None
        assert engine.get_range(KEYS[1], 0, 10) == part(1, 0, 10)
        assert engine.delete(KEYS[1]) is True
        assert engine.get_range(KEYS[1], 0, 10) is None
        engine.put(KEYS[1], b"another")
        assert engine.get_range(KEYS[1], 0, 10) == b"another"
        # Who comes later reads anew.
        with engine.reading_ahead([(KEYS[1], 7)]):
            assert engine.get_range(KEYS[1], 0, 10) == b"another"
    engine.close()


def test_a_failure_is_told_to_who_reads(inside):
    engine = ReadAheadEngine(inside)

    def fail(method, keys):
        raise StorageUnavailableError("gone")

    inside.set_faults(fail)
    with engine.reading_ahead(OBJECTS), pytest.raises(StorageUnavailableError, match="gone"):
        engine.get_range(KEYS[0], 0, 10)
    inside.set_faults()
    with engine.reading_ahead(OBJECTS):
        assert engine.get_range(KEYS[0], 0, 10) == part(0, 0, 10)
    engine.close()
    with pytest.raises(StorageUnavailableError, match="closed"), engine.reading_ahead(OBJECTS):
        pass
