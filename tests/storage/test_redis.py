import contextlib
import itertools
import threading
import time

import pytest
import redis
import redis.cluster
from store_kit import contents, fill

from sglang_kvcodec.errors import ConfigurationError, StorageUnavailableError
from sglang_kvcodec.storage import redis_engine, redis_index, redis_scripts
from sglang_kvcodec.storage.base import StoreStat
from sglang_kvcodec.storage.redis_connection import RedisAddress
from sglang_kvcodec.storage.redis_engine import RedisEngine
from sglang_kvcodec.testing.storage import StorageEngineContract, make_key, make_value
from sglang_kvcodec.testing.valkey import ValkeyProcess, valkey_cluster

PREFIXES = (f"store{number}" for number in itertools.count())


@pytest.fixture
def open_store():
    with contextlib.ExitStack() as stack:

        def open_it(scheme, hosts, capacity_bytes, prefix=None):
            location = f"//{hosts}?prefix={prefix or next(PREFIXES)}"
            return stack.enter_context(
                contextlib.closing(RedisEngine(RedisAddress.parse(scheme, location), capacity_bytes))
            )

        yield open_it


class TestRedisEngine(StorageEngineContract):
    @pytest.fixture
    def make_engine(self, valkey, open_store):
        return lambda capacity_bytes: open_store("redis", valkey.address, capacity_bytes)


class TestRedisClusterEngine(StorageEngineContract):
    @pytest.fixture
    def make_engine(self, cluster, open_store):
        return lambda capacity_bytes: open_store("rediscluster", cluster[0].address, capacity_bytes)


def objects_in(process, prefix):
    with redis.Redis(port=process.port) as client:
        return {name: client.strlen(name) for name in client.scan_iter(match=f"{prefix}:o:*")}


def test_all_is_there_for_the_next_peer(valkey, open_store):
    store = open_store("redis", valkey.address, 100, "kept")
    fill(store, "abcd")  # evicts a
    store.get(make_key("b"))
    store.close()
    store = open_store("redis", valkey.address, 100, "kept")
    assert store.stat() == StoreStat(3, 90, 100, 1)
    fill(store, "e")
    assert contents(store, "abcde") == {name: make_value(name, 30) for name in "bde"}
    assert store.stat() == StoreStat(3, 90, 100, 2)


def test_a_smaller_capacity_evicts_at_the_next_start(valkey, open_store, monkeypatch):
    monkeypatch.setattr(redis_index, "_NAMES_PER_STEP", 7)
    store = open_store("redis", valkey.address, 10_000, "shrinks")
    fill(store, range(100), 100)
    store = open_store("redis", valkey.address, 1_234, "shrinks")
    assert store.stat() == StoreStat(12, 1_200, 1_234, 88)
    assert set(contents(store, range(100))) == set(range(88, 100))
    assert sum(objects_in(valkey, "shrinks").values()) == 1_200


def test_peers_that_share_a_store(cluster, open_store):
    """Each sees at once what the other does, however much it remembers; together they keep to the capacity."""
    first, second = (open_store("rediscluster", node.address, 100, "shared") for node in cluster[:2])
    fill(first, "abc")
    assert second.get_range(make_key("b"), 1, 5) == make_value("b", 30)[1:5]
    assert second.put(make_key("b"), bytes(7)) is False
    assert first.delete(make_key("b")) is True
    assert second.get_range(make_key("b"), 1, 5) is None
    assert first.put(make_key("b"), b"another") is True
    assert second.get_range(make_key("b"), 1, 5) == b"nothe"[:4]
    fill(second, "defg")
    assert first.stat() == second.stat()
    assert first.stat().stored_bytes <= 100
    held = contents(first, "abcdefg")
    assert held == contents(second, "abcdefg")
    assert set("efg") <= set(held)


def test_many_peers_never_exceed_the_capacity(cluster, open_store):
    """Counted in the servers themselves, while three peers put and evict at once."""
    capacity_bytes = 30_000
    stores = [open_store("rediscluster", node.address, capacity_bytes, "bounded") for node in cluster]
    ended = threading.Event()
    most = []

    def put_all(number):
        for i in range(200):
            stores[number].put(make_key((number % 2, i)), bytes(100 + 7 * (i % 50)))

    def watch():
        with redis.cluster.RedisCluster(port=cluster[0].port, host="127.0.0.1") as client:
            while not ended.is_set():
                # Names are used once: what is gone when its turn comes counts nothing.
                names = list(client.scan_iter(match="bounded:o:*"))
                sizes = {name: client.strlen(name) for name in names}
                again = set(client.scan_iter(match="bounded:o:*"))
                most.append(sum(size for name, size in sizes.items() if name in again))

    threads = [threading.Thread(target=put_all, args=(number,)) for number in range(3)]
    watcher = threading.Thread(target=watch)
    for thread in [*threads, watcher]:
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    watcher.join()
    assert max(most) <= capacity_bytes
    assert len(most) > 1
    held = {
        key: value for number in (0, 1) for i in range(200) if (value := stores[0].get(key := make_key((number, i))))
    }
    assert stores[0].stat().stored_bytes == sum(map(len, held.values()))


@pytest.mark.parametrize("reached", [False, True])
def test_a_peer_that_dies_in_a_put(valkey, open_store, monkeypatch, reached):
    """What it held is free when its lease has run out, and its object, if it got there, is deleted."""
    prefix = f"dies-{reached}"
    store = open_store("redis", valkey.address, 100, prefix)
    fill(store, "a")

    class Killed(BaseException):
        pass

    def dies(*command):
        if reached:
            call(*command)
        raise Killed

    call = store._connection.call
    monkeypatch.setattr(redis_engine, "_LEASE_S", 0.05)
    monkeypatch.setattr(store._connection, "call", dies)
    with pytest.raises(Killed):
        store.put(make_key("b"), bytes(70))
    after = open_store("redis", valkey.address, 100, prefix)
    assert contents(after, "ab") == {"a": make_value("a", 30)}
    time.sleep(0.1)
    # The lease of this put is as long as usual, however slow the machine is.
    monkeypatch.undo()
    assert after.put(make_key("b"), make_value("b", 65)) is True
    assert contents(after, "ab") == {"a": make_value("a", 30), "b": make_value("b", 65)}
    assert sum(objects_in(valkey, prefix).values()) == 95


def test_a_put_that_fails_gives_its_room_back(valkey, open_store, monkeypatch):
    store = open_store("redis", valkey.address, 100, "fails")
    run = store._connection.run

    def fail_commits(script, *rest):
        if script is redis_scripts.COMMIT:
            raise StorageUnavailableError("gone")
        return run(script, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(store._connection, "run", fail_commits)
        with pytest.raises(StorageUnavailableError, match="gone"):
            store.put(make_key("a"), bytes(100))
    assert objects_in(valkey, "fails") == {}
    assert store.put(make_key("b"), bytes(100)) is True
    assert store.stat() == StoreStat(1, 100, 100, 0)


def test_a_put_that_outlives_its_lease_is_refused(valkey, open_store, monkeypatch):
    store = open_store("redis", valkey.address, 100, "late")
    monkeypatch.setattr(redis_engine, "_LEASE_S", -1.0)
    with pytest.raises(StorageUnavailableError, match="too long"):
        store.put(make_key("a"), bytes(100))
    assert objects_in(valkey, "late") == {}
    assert store.get(make_key("a")) is None


def test_objects_that_the_servers_have_lost_are_misses(valkey, open_store):
    store = open_store("redis", valkey.address, 100, "lost")
    fill(store, "abc")
    with redis.Redis(port=valkey.port) as client:
        for name in objects_in(valkey, "lost"):
            if name[7:71] in (make_key("a"), make_key("b")):
                client.delete(name)
    assert store.get(make_key("a")) is None
    assert store.get_range(make_key("b"), 3, 7) is None
    assert store.sizes([make_key(name) for name in "abc"]) == [None, None, 30]
    assert store.stat() == StoreStat(1, 30, 100, 0)
    assert store.put(make_key("a"), bytes(70)) is True


def test_tidying_deletes_what_no_index_knows(cluster, open_store):
    store = open_store("rediscluster", cluster[0].address, 1000, "tidied")
    fill(store, "abc")
    with redis.cluster.RedisCluster(port=cluster[0].port, host="127.0.0.1") as client:
        strays = [b"tidied:o:" + make_key(name) + b"0123456789abcdef" for name in "axyz"]
        for name in strays:
            client.set(name, b"stray")
        other = b"tidied2:o:" + make_key("a") + b"0123456789abcdef"
        client.set(other, b"of another store")
        store.tidy()
        assert [client.get(name) for name in strays] == [None] * 4
        assert client.get(other) == b"of another store"
    assert contents(store, "abc") == {name: make_value(name, 30) for name in "abc"}


def test_a_server_that_dies_and_comes_back(tmp_path, open_store):
    """With its log synced at each write, as for a store that is to be durable, no acknowledged object is lost."""
    durable = ("--appendonly", "yes", "--appendfsync", "always")
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(ValkeyProcess(tmp_path / "valkey", durable))
        store = open_store("redis", process.address, 1000)
        fill(store, "abc")
        process.kill()
        for use in (
            lambda: store.get(make_key("a")),
            lambda: store.sizes([make_key("a")]),
            lambda: store.put(make_key("d"), bytes(30)),
            lambda: store.delete(make_key("a")),
            store.stat,
            store.tidy,
        ):
            with pytest.raises(StorageUnavailableError, match=str(process.port)):
                use()
        stack.enter_context(process.restart())
        assert contents(store, "abcd") == {name: make_value(name, 30) for name in "abc"}
        fill(store, "d")
        assert store.stat() == StoreStat(4, 120, 1000, 0)


def test_a_server_without_memory_refuses(tmp_path, open_store):
    with ValkeyProcess(tmp_path / "valkey", ("--maxmemory", "8mb", "--maxmemory-policy", "noeviction")) as process:
        store = open_store("redis", process.address, 1 << 30, "full")
        stored = 0
        with contextlib.suppress(StorageUnavailableError):
            while stored < 100 and store.put(make_key(stored), bytes(1 << 20)):
                stored += 1
        assert 0 < stored < 100
        with pytest.raises(StorageUnavailableError, match="memory"):
            store.put(make_key(stored), bytes(1 << 20))
        assert store.get(make_key(0)) == bytes(1 << 20)
        assert store.stat().objects == len(objects_in(process, "full")) == stored


def test_a_server_that_evicts_by_itself_is_refused(tmp_path, open_store):
    evicting = ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    with (
        ValkeyProcess(tmp_path / "valkey", evicting) as process,
        pytest.raises(ConfigurationError, match="maxmemory-policy"),
    ):
        open_store("redis", process.address, 1000)


def test_nobody_there(open_store):
    with pytest.raises(StorageUnavailableError, match=r"127\.0\.0\.1:1"):
        open_store("redis", "127.0.0.1:1", 1000)
    with pytest.raises(StorageUnavailableError, match=r"127\.0\.0\.1:1"):
        open_store("rediscluster", "127.0.0.1:1", 1000)


def test_no_cluster(valkey, open_store):
    with pytest.raises(StorageUnavailableError, match=str(valkey.port)):
        open_store("rediscluster", valkey.address, 1000)


@pytest.mark.parametrize(
    ("scheme", "location", "address"),
    [
        ("redis", "//host", RedisAddress((("host", 6379),), False, 0, "kvcodec", False, None, None)),
        ("rediss", "//u%40:p%3A@[::1]:7/3", RedisAddress((("::1", 7),), False, 3, "kvcodec", True, "u@", "p:")),
        (
            "rediscluster",
            "//a:1,b?prefix=x.y",
            RedisAddress((("a", 1), ("b", 6379)), True, 0, "x.y", False, None, None),
        ),
    ],
)
def test_addresses(scheme, location, address):
    assert RedisAddress.parse(scheme, location) == address
    assert "p:" not in repr(address)


def test_the_password_from_the_environment(monkeypatch):
    monkeypatch.setenv("KVCODEC_STORE_PASSWORD", "secret")
    assert RedisAddress.parse("redis", "//user@host").password == "secret"
    assert RedisAddress.parse("redis", "//user:other@host").password == "other"


@pytest.mark.parametrize(
    ("scheme", "location", "says"),
    [
        ("redis", "", "HOST:PORT"),
        ("redis", "//host:0", "HOST:PORT"),
        ("redis", "//a,b", "rediscluster"),
        ("redis", "//host/x", "number"),
        ("rediscluster", "//host/1", "cluster has none"),
        ("redis", "//host?prefix=a*", "letters"),
        ("redis", "//host?timeout=1", "no option timeout"),
    ],
)
def test_bad_addresses(scheme, location, says):
    with pytest.raises(ConfigurationError, match=says):
        RedisAddress.parse(scheme, location)


@pytest.mark.parametrize("lost", range(3))
def test_a_node_that_comes_back_empty(tmp_path, open_store, lost):
    """Whether it had the index or only objects: no error that stays, and the counts are true again after tidying."""
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(valkey_cluster(tmp_path / "cluster"))
        store = open_store("rediscluster", ",".join(node.address for node in nodes), 10_000, "empty")
        fill(store, range(50), 100)
        nodes[lost].kill()
        nodes[lost] = stack.enter_context(nodes[lost].restart())
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(StorageUnavailableError):
                held = contents(store, range(50))
                store.tidy()
                break
            assert time.monotonic() < deadline
        assert 0 <= len(held) < 50
        assert held == {name: make_value(name, 100) for name in held}
        assert store.stat().stored_bytes == 100 * len(held)
        assert sum(sum(objects_in(node, "empty").values()) for node in nodes) == 100 * len(held)
        fill(store, range(50), 100)
        assert contents(store, range(50)) == {name: make_value(name, 100) for name in range(50)}
