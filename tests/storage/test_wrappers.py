import pytest

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.errors import StorageUnavailableError
from sglang_kvcodec.storage import EngineWrapper, ExpiringEngine, FaultyEngine, MeteredEngine
from sglang_kvcodec.storage.base import StoreStat
from sglang_kvcodec.storage.lmdb_engine import LmdbEngine
from sglang_kvcodec.storage.memory import MemoryEngine
from sglang_kvcodec.testing.storage import StorageEngineContract, make_key, make_value


class TestWrappedEngine(StorageEngineContract):
    """All of them around each other are an engine like any other."""

    @pytest.fixture(params=["memory", "lmdb"])
    def make_engine(self, request, tmp_path):
        opened = []

        def make(capacity_bytes):
            inside = (
                MemoryEngine(capacity_bytes)
                if request.param == "memory"
                else LmdbEngine(tmp_path / str(len(opened)), capacity_bytes)
            )
            opened.append(EngineWrapper(MeteredEngine(ExpiringEngine(FaultyEngine(inside), ttl_s=1e9))))
            return opened[-1]

        yield make
        for engine in opened:
            engine.close()


@pytest.fixture(params=["memory", "lmdb"])
def inside(request, tmp_path):
    engine = MemoryEngine(1000) if request.param == "memory" else LmdbEngine(tmp_path / "store", 1000)
    yield engine
    engine.close()


def test_what_has_expired_is_deleted_when_it_is_asked_for(inside):
    """Whichever way; what was put later is there."""
    ways = {
        "get": lambda engine, key: engine.get(key),
        "get_range": lambda engine, key: engine.get_range(key, 0, 5),
        "sizes": lambda engine, key: engine.sizes([key])[0],
        "stored_at_s": lambda engine, key: engine.stored_at_s([key])[0],
        "delete": lambda engine, key: engine.delete(key) or None,
    }
    now_s = [0.0]
    engine = ExpiringEngine(inside, 10.0, clock_s=lambda: now_s[0])
    for name in ways:
        engine.put(make_key(name), make_value(name, 7))
    put_at_s = max(at for at in inside.stored_at_s([make_key(name) for name in ways]))
    now_s[0] = min(inside.stored_at_s([make_key(name) for name in ways])) + 9.9
    assert engine.sizes([make_key(name) for name in ways]) == [7] * 5
    now_s[0] = put_at_s + 10
    for name, ask in ways.items():
        before = peer_metrics.STORE_EXPIRED._value.get()
        assert ask(engine, make_key(name)) is None
        assert peer_metrics.STORE_EXPIRED._value.get() == before + 1
        assert inside.sizes([make_key(name)]) == [None]
    assert engine.stat() == StoreStat(0, 0, 1000, 0)


def test_an_expired_object_may_be_put_again(inside):
    now_s = [0.0]
    engine = ExpiringEngine(inside, 10.0, clock_s=lambda: now_s[0])
    assert engine.put(make_key("a"), b"old") is True
    assert engine.put(make_key("a"), b"newer") is False
    now_s[0] = inside.stored_at_s([make_key("a")])[0] + 10
    assert engine.put(make_key("a"), b"newest") is True
    assert inside.get(make_key("a")) == b"newest"


@pytest.mark.parametrize("way", ["key_batches", "tidy"])
def test_what_nobody_asks_for_expires_as_well(inside, way):
    now_s = [0.0]
    engine = ExpiringEngine(inside, 10.0, clock_s=lambda: now_s[0])
    for i in range(7):
        engine.put(make_key(i), b"x")
    assert sum(map(len, engine.key_batches())) == 7
    now_s[0] = max(inside.stored_at_s([make_key(i) for i in range(7)])) + 10
    if way == "tidy":
        engine.tidy()
    else:
        assert [key for batch in engine.key_batches() for key in batch] == []
    assert inside.stat() == StoreStat(0, 0, 1000, 0)


def test_times_outlive_the_process(tmp_path):
    first = LmdbEngine(tmp_path / "store", 1000)
    first.put(make_key("a"), b"x")
    (put_at_s,) = first.stored_at_s([make_key("a")])
    first.close()
    second = LmdbEngine(tmp_path / "store", 1000)
    engine = ExpiringEngine(second, 10.0, clock_s=lambda: put_at_s + 10)
    assert engine.get(make_key("a")) is None
    engine.close()


def metered(method):
    return peer_metrics.STORE_CALL_SECONDS.labels(method)._sum.get()


def test_calls_and_errors_are_counted():
    def fail(method, keys):
        raise StorageUnavailableError(method)

    faulty = FaultyEngine(MemoryEngine(100))
    engine = MeteredEngine(faulty)
    uses = {
        "put": lambda: engine.put(make_key("a"), b"x"),
        "get": lambda: engine.get(make_key("a")),
        "get_range": lambda: engine.get_range(make_key("a"), 0, 1),
        "sizes": lambda: engine.sizes([make_key("a")]),
        "delete": lambda: engine.delete(make_key("a")),
    }
    for method, use in uses.items():
        before = metered(method)
        use()
        assert metered(method) > before
    faulty.set_faults(fail)
    for method, use in uses.items():
        errors = peer_metrics.STORE_ERRORS.labels(method, "storage_unavailable")._value
        before = errors.get()
        with pytest.raises(StorageUnavailableError, match=method):
            use()
        assert errors.get() == before + 1
    with engine.ranges() as get_range, pytest.raises(StorageUnavailableError, match="get_range"):
        get_range(make_key("a"), 0, 1)
    faulty.set_faults()
    assert engine.put(make_key("a"), b"x") is True


def test_damage():
    engine = FaultyEngine(MemoryEngine(100))
    engine.put(make_key("a"), b"value")
    engine.set_faults(damage=lambda data: data[:-1] + b"?")
    assert engine.get(make_key("a")) == b"valu?"
    with engine.ranges() as get_range:
        assert get_range(make_key("a"), 1, 3) == b"a?"
    assert engine.get(make_key("b")) is None
