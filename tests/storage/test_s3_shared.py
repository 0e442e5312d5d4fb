import contextlib
import http.server
import itertools
import threading
import time

import obstore
import pytest
import redis
import redis.cluster
from store_kit import contents, fill

from sglang_kvcodec.errors import ConfigurationError, StorageUnavailableError
from sglang_kvcodec.storage import redis_index, redis_scripts, s3_layouts, s3_shared_engine
from sglang_kvcodec.storage.base import StoreStat
from sglang_kvcodec.storage.redis_connection import RedisAddress
from sglang_kvcodec.storage.s3_bucket import S3Address, S3Bucket
from sglang_kvcodec.storage.s3_engine import S3Engine
from sglang_kvcodec.storage.s3_shared_engine import SharedS3Engine
from sglang_kvcodec.testing.storage import StorageEngineContract, make_key, make_value
from sglang_kvcodec.testing.valkey import ValkeyProcess

PREFIXES = (f"shared/{number}" for number in itertools.count())
MIB = 1 << 20


@pytest.fixture
def address_of(seaweed):
    return lambda prefix: S3Address.parse(f"//kvcodec/{prefix}?endpoint={seaweed.endpoint}")


@pytest.fixture
def open_store(address_of, valkey):
    with contextlib.ExitStack() as stack:

        def open_it(capacity_bytes, prefix=None, index=None, **options):
            scheme, _, location = (index or f"redis://{valkey.address}").partition(":")
            store = SharedS3Engine(
                address_of(prefix or next(PREFIXES)), RedisAddress.parse(scheme, location), capacity_bytes, **options
            )
            return stack.enter_context(contextlib.closing(store))

        yield open_it


class TestSharedS3Engine(StorageEngineContract):
    @pytest.fixture
    def make_engine(self, open_store):
        return open_store


def objects_in(store):
    """Name and size of what lies in the bucket."""
    return {found.name: found.size_bytes for batch in store._bucket.list("indexed") for found in batch}


def path_of(name, token="0123456789abcdef"):
    return f"indexed/{make_key(name).hex()}-{token}"


def held_bytes(store, client):
    return int(client.hget(store._index._keys[-1], "held") or 0)


def wait_until(condition):
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture
def client(valkey):
    with redis.Redis(port=valkey.port) as client:
        yield client


def lose_index(store, client):
    client.delete(*store._index._keys)


def test_all_is_there_for_the_next_peer(open_store):
    store = open_store(100, "kept")
    fill(store, "abcd")  # evicts a
    store.get(make_key("b"))
    store.close()
    store = open_store(100, "kept")
    assert store.stat() == StoreStat(3, 90, 100, 1)
    fill(store, "e")
    assert contents(store, "abcde") == {name: make_value(name, 30) for name in "bde"}
    assert store.stat() == StoreStat(3, 90, 100, 2)


def test_a_smaller_capacity_evicts_at_the_next_start(open_store, monkeypatch):
    monkeypatch.setattr(redis_index, "_NAMES_PER_STEP", 7)
    store = open_store(10_000, "shrinks")
    fill(store, range(100), 100)
    store = open_store(1_234, "shrinks")
    assert store.stat() == StoreStat(12, 1_200, 1_234, 88)
    assert set(contents(store, range(100))) == set(range(88, 100))
    assert sum(objects_in(store).values()) == 1_200


def test_peers_are_interchangeable(open_store):
    """Each sees at once what the other does, however much it remembers; when one ends the others go on."""
    first, second, third = (open_store(100, "interchangeable") for _ in range(3))
    fill(first, "abc")
    assert second.get_range(make_key("b"), 1, 5) == make_value("b", 30)[1:5]
    assert second.put(make_key("b"), bytes(7)) is False
    assert third.delete(make_key("b")) is True
    assert second.get_range(make_key("b"), 1, 5) is None
    assert first.put(make_key("b"), b"another") is True
    assert second.get_range(make_key("b"), 1, 5) == b"nothe"[:4]
    first.close()
    fill(second, "defg")
    assert second.stat() == third.stat()
    assert third.stat().stored_bytes <= 100
    held = contents(second, "abcdefg")
    assert held == contents(third, "abcdefg")
    assert set("efg") <= set(held)
    assert sum(objects_in(third).values()) == third.stat().stored_bytes


def test_many_peers_never_exceed_the_capacity(cluster, open_store):
    """Counted in the bucket itself, while three peers put, evict and delete at once."""
    capacity_bytes = 30_000
    index = "rediscluster://" + ",".join(node.address for node in cluster)
    stores = [open_store(capacity_bytes, "bounded", index) for _ in range(3)]
    ended = threading.Event()
    most = []
    failures = []

    def work(number):
        try:
            for i in range(150):
                stores[number].put(make_key((number % 2, i)), bytes(100 + 70 * (i % 50)))
                if i % 7 == 0:
                    stores[number].delete(make_key((0, i // 2)))
        except Exception as error:
            failures.append(error)

    def watch():
        while not ended.is_set():
            # Names are used once: what has gone when it is listed again counts nothing.
            sizes, again = objects_in(stores[0]), objects_in(stores[0])
            most.append(sum(size for name, size in sizes.items() if name in again))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    watcher = threading.Thread(target=watch)
    for thread in [*threads, watcher]:
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    watcher.join()
    assert failures == []
    assert len(most) > 1
    assert max(most) <= capacity_bytes
    assert stores[0].stat().evicted_objects > 0
    held = {
        key: value for number in (0, 1) for i in range(150) if (value := stores[1].get(key := make_key((number, i))))
    }
    stored_bytes = sum(map(len, held.values()))
    assert (stores[2].stat().objects, stores[2].stat().stored_bytes) == (len(held), stored_bytes)
    assert sum(objects_in(stores[2]).values()) == stored_bytes
    with redis.cluster.RedisCluster(port=cluster[0].port, host="127.0.0.1") as client:
        assert held_bytes(stores[0], client) == stored_bytes


def test_stores_on_one_redis_are_apart(open_store):
    """Though their indexes have one prefix: a bucket says which index is its own."""
    one, other = open_store(100, "one"), open_store(100, "other")
    fill(one, "abc")
    fill(other, "ad")
    one.tidy()
    assert one.stat() == StoreStat(3, 90, 100, 0)
    assert other.stat() == StoreStat(2, 60, 100, 0)
    assert other.delete(make_key("a")) is True
    assert contents(one, "abcd") == {name: make_value(name, 30) for name in "abc"}


@pytest.mark.parametrize("reached", [False, True])
def test_a_peer_that_dies_in_a_put(open_store, monkeypatch, reached):
    """What it held is free when its lease has run out, and its object, if it got there, is deleted."""
    prefix = f"dies/{reached}"
    store = open_store(100, prefix)
    fill(store, "a")

    class Killed(BaseException):
        pass

    def dies(*arguments):
        if reached:
            replace(*arguments)
        raise Killed

    replace = store._bucket.replace
    monkeypatch.setattr(s3_shared_engine, "_LEASE_S", 0.05)
    monkeypatch.setattr(store._bucket, "replace", dies)
    with pytest.raises(Killed):
        store.put(make_key("b"), bytes(70))
    after = open_store(100, prefix)
    after.tidy()
    assert contents(after, "ab") == {"a": make_value("a", 30)}
    time.sleep(0.1)
    # The lease of this put is as long as usual, however slow the machine is.
    monkeypatch.undo()
    assert after.put(make_key("b"), make_value("b", 65)) is True
    assert contents(after, "ab") == {"a": make_value("a", 30), "b": make_value("b", 65)}
    assert sum(objects_in(after).values()) == 95


@pytest.mark.parametrize("reached", [False, True])
def test_a_put_that_fails_gives_its_room_back(open_store, monkeypatch, reached):
    store = open_store(100)

    def fail(*arguments):
        if reached:
            replace(*arguments)
        raise StorageUnavailableError("timed out")

    replace = store._bucket.replace
    with monkeypatch.context() as patch:
        patch.setattr(store._bucket, "replace", fail)
        with pytest.raises(StorageUnavailableError, match="timed out"):
            store.put(make_key("a"), bytes(100))
    assert objects_in(store) == {}
    assert store.put(make_key("b"), bytes(100)) is True
    assert store.stat() == StoreStat(1, 100, 100, 0)


def test_a_put_that_outlives_its_lease_is_refused(open_store, monkeypatch):
    store = open_store(100)
    monkeypatch.setattr(s3_shared_engine, "_LEASE_S", -1.0)
    with pytest.raises(StorageUnavailableError, match="too long"):
        store.put(make_key("a"), bytes(100))
    assert objects_in(store) == {}
    assert store.get(make_key("a")) is None


def test_room_is_free_only_when_the_bucket_has_deleted(open_store, client, monkeypatch):
    """A deletion that fails leaves its bytes counted, until somebody who needs room has deleted the object."""
    store = open_store(100)
    fill(store, "abc")

    def fail(names):
        raise StorageUnavailableError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(store._bucket, "delete", fail)
        with pytest.raises(StorageUnavailableError, match="gone"):
            store.delete(make_key("a"))
        with pytest.raises(StorageUnavailableError, match="gone"):
            store.put(make_key("d"), bytes(40))
    assert store.get(make_key("a")) is None
    assert held_bytes(store, client) == 90
    assert store.put(make_key("d"), make_value("d", 40)) is True
    assert contents(store, "abcd") == {"b": make_value("b", 30), "c": make_value("c", 30), "d": make_value("d", 40)}
    assert sum(objects_in(store).values()) == held_bytes(store, client) == 100


def test_objects_that_others_have_deleted_are_misses(open_store, client):
    store = open_store(100)
    fill(store, "abc")
    keys = {make_key(name).hex() for name in "ab"}
    store._bucket.delete([name for name in objects_in(store) if name[8:136] in keys])
    assert store.get(make_key("a")) is None
    assert store.get_range(make_key("b"), 3, 7) is None
    assert store.sizes([make_key(name) for name in "abc"]) == [None, None, 30]
    assert store.stat() == StoreStat(1, 30, 100, 0)
    assert held_bytes(store, client) == 30
    assert store.put(make_key("a"), bytes(70)) is True


def test_an_index_that_was_lost_is_rebuilt_at_the_start(open_store, client):
    """What the bucket has is counted and served again, and the capacity holds."""
    store = open_store(30_000, "rebuilt")
    count = 1_003
    fill(store, range(count), 20)
    before = objects_in(store)
    store.close()
    lose_index(store, client)
    store = open_store(30_000, "rebuilt")
    assert store.stat() == StoreStat(count, 20 * count, 30_000, 0)
    assert held_bytes(store, client) == 20 * count
    assert objects_in(store) == before
    assert contents(store, range(count)) == {name: make_value(name, 20) for name in range(count)}
    store.close()
    lose_index(store, client)
    store = open_store(95, "rebuilt")
    assert store.stat() == StoreStat(4, 80, 95, count - 4)
    assert sum(objects_in(store).values()) == held_bytes(store, client) == 80


def test_what_was_adopted_goes_before_what_was_used_and_the_oldest_first(open_store, client):
    store = open_store(150, "adopted")
    fill(store, "abcd")
    lose_index(store, client)
    token = store._index.begin_rebuild()
    names = {found.name[:64]: found for batch in store._named.scan() for found in batch}
    # A store that knows its puts by the second puts them all at one time.
    found = [names[make_key(name)]._replace(stored_at_s=1000.5 + at) for at, name in enumerate("badc")]
    assert store._index.adopt(found) == []
    assert store._index.adopt(found) == []
    assert store._index.end_rebuild(token) is True
    assert store.stored_at_s([make_key(name) for name in "badc"]) == [1000.5, 1001.5, 1002.5, 1003.5]
    store.get(make_key("b"))
    fill(store, "e", 60)
    assert [stored and stored.size_bytes for stored in store.peek([make_key(name) for name in "bade"])] == [
        30,
        None,
        30,
        60,
    ]
    fill(store, "f", 60)
    assert set(contents(store, "abcdef")) == set("bef")


def test_peers_rebuild_an_index_that_is_lost_while_they_run(open_store, client, monkeypatch):
    """A put waits for it: before, nobody knows how much there is."""
    first, second = (open_store(100, "lost", watch_s=3600) for _ in range(2))
    fill(first, "abc")
    lose_index(first, client)
    assert first.sizes([make_key("a")]) == [None]
    assert second.put(make_key("d"), make_value("d", 40)) is True
    held = contents(first, "abcd")
    assert set("d") < set(held) < set("abcd")
    assert held == {name: make_value(name, 40 if name == "d" else 30) for name in held}
    assert first.stat() == StoreStat(3, 100, 100, 1)
    assert sum(objects_in(first).values()) == held_bytes(first, client) == 100


def test_an_index_that_is_not_rebuilt_takes_no_puts(open_store, client, monkeypatch):
    """Nor does it say what is not there, where that is more than a miss."""
    store = open_store(100, watch_s=3600)
    fill(store, "ab")

    def fail(folder):
        raise StorageUnavailableError("no list")

    with monkeypatch.context() as patch:
        patch.setattr(store._bucket, "list", fail)
        patch.setattr("sglang_kvcodec.storage.indexed_engine._ROOM_WAIT_S", 0.1)
        lose_index(store, client)
        for use in (
            lambda: store.put(make_key("c"), bytes(30)),
            lambda: store.delete(make_key("a")),
            lambda: list(store.key_batches()),
        ):
            with pytest.raises(StorageUnavailableError, match="rebuilt"):
                use()
    assert store.put(make_key("c"), make_value("c", 30)) is True
    assert contents(store, "abc") == {name: make_value(name, 30) for name in "abc"}


def test_an_index_that_is_lost_while_it_is_rebuilt_is_rebuilt_again(open_store, client, monkeypatch):
    store = open_store(1000, "twice", watch_s=3600)
    fill(store, "abc")
    lose_index(store, client)
    scan = store._named.scan
    scans = []

    def scan_and_lose():
        scans.append(scan)
        batches = list(scan())
        if len(scans) == 2:
            # Half of it has been adopted.
            store._index.adopt(batches[0][:1])
            lose_index(store, client)
            batches[0] = batches[0][1:]
        return iter(batches)

    with monkeypatch.context() as patch:
        patch.setattr(store._named, "scan", scan_and_lose)
        store.tidy()
    assert store._index.is_complete() is False
    assert store.stat().objects == 2
    assert open_store(1000, "twice").stat() == StoreStat(3, 90, 1000, 0)
    assert store._index.is_complete() is True


def test_strays_are_adopted(open_store, client):
    """As a Redis leaves them that has forgotten its last writes. Of two of one key one goes."""
    store = open_store(200, "strays")
    fill(store, "abc")
    for name in "axy":
        store._bucket.replace(path_of(name), make_value(name, 40))
    store._bucket.replace(path_of("y", "f" * 16), make_value("y", 40))
    store.tidy()
    assert store.stat() == StoreStat(5, 170, 200, 0)
    assert contents(store, "abcxy") == {name: make_value(name, 40 if name in "xy" else 30) for name in "abcxy"}
    assert sum(objects_in(store).values()) == held_bytes(store, client) == 170
    for name in "zuv":
        store._bucket.replace(path_of(name), make_value(name, 40))
    store.tidy()
    assert store.stat().stored_bytes <= 200
    assert set("abcxy") <= set(contents(store, "abcxyzuv"))
    assert sum(objects_in(store).values()) == held_bytes(store, client) == store.stat().stored_bytes


def test_foreign_names_are_left_alone(open_store):
    store = open_store(100, "foreign")
    names = ["indexed/readme", path_of("a") + "0", f"indexed/{make_key('a').hex()}", f"objects/{make_key('a').hex()}"]
    for name in names:
        store._bucket.replace(name, bytes(1000))
    store.tidy()
    assert store.stat() == StoreStat(0, 0, 100, 0)
    fill(store, "abcd")
    assert all(store._bucket.get(name) == bytes(1000) for name in names)


def test_what_another_peer_deletes_after_it_was_listed_is_not_adopted(open_store, client, monkeypatch):
    store, other = (open_store(100, "raced") for _ in range(2))
    fill(store, "abc")
    scan = store._named.scan

    def scan_late():
        batches = list(scan())
        other.delete(make_key("b"))
        return iter(batches)

    monkeypatch.setattr(store._named, "scan", scan_late)
    store.tidy()
    assert store.stat() == StoreStat(2, 60, 100, 0)
    assert held_bytes(store, client) == 60


def test_a_put_under_way_is_no_stray(open_store, client, monkeypatch):
    """And where the index is lost meanwhile, another peer may adopt it before its put commits."""
    for loses in (False, True):
        prefix = f"under-way/{loses}"
        store, other = (open_store(100, prefix, watch_s=3600) for _ in range(2))
        replace = store._bucket.replace

        def replace_and_tidy(*arguments, replace=replace, other=other, loses=loses):
            replace(*arguments)
            if loses:
                lose_index(other, client)
            other.tidy()
            assert other.stat().objects == loses

        monkeypatch.setattr(store._bucket, "replace", replace_and_tidy)
        assert store.put(make_key("a"), make_value("a", 30)) is True
        assert contents(other, "a") == {"a": make_value("a", 30)}
        assert other.stat() == StoreStat(1, 30, 100, 0)
        assert held_bytes(store, client) == 30


@pytest.mark.parametrize(("size_bytes", "parts"), [(16 * MIB, ""), (16 * MIB + 1, "-3"), (21 * MIB, "-3")])
def test_large_objects_are_put_in_parts(open_store, size_bytes, parts):
    store = open_store(64 * MIB)
    value = make_value("large", size_bytes)
    assert store.put(make_key("large"), value) is True
    (name,) = objects_in(store)
    # The tag of an object that was put in parts ends with their number.
    assert obstore.head(store._bucket._store, name)["e_tag"].strip('"').partition("-")[2] == parts.removeprefix("-")
    assert store.get(make_key("large")) == value
    for start, stop in ((0, 5), (8 * MIB - 3, 8 * MIB + 3), (size_bytes - 7, size_bytes + 9), (MIB, 9 * MIB)):
        assert store.get_range(make_key("large"), start, stop) == value[start:stop]
    store.delete(make_key("large"))
    assert objects_in(store) == {}


class _NoParts(http.server.BaseHTTPRequestHandler):
    """A store that takes the start of an upload and none of its parts."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.calls.append((self.command, self.path.partition("?")[2]))
        body = b"<InitiateMultipartUploadResult><UploadId>7</UploadId></InitiateMultipartUploadResult>"
        body = body if self.command == "POST" else b""
        self.send_response({"PUT": 403, "DELETE": 204}.get(self.command, 200))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_):
        pass


def test_the_parts_of_an_upload_that_fails_are_given_up(seaweed):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _NoParts) as store:
        store.calls = []
        thread = threading.Thread(target=store.serve_forever)
        thread.start()
        bucket = S3Bucket(S3Address.parse(f"//kvcodec/parts?endpoint=http://127.0.0.1:{store.server_port}"))
        with pytest.raises(StorageUnavailableError):
            bucket.replace("large", bytes(20 * MIB))
        store.shutdown()
        thread.join()
    assert ("DELETE", "uploadId=7") in store.calls


def test_layouts_refuse_each_other(open_store, address_of):
    shared = open_store(100, "of-several")
    fill(shared, "a")
    with pytest.raises(ConfigurationError, match="of-several is a store that peers share"):
        S3Engine(address_of("of-several"), 100)
    assert contents(open_store(100, "of-several"), "a") == {"a": make_value("a", 30)}
    with contextlib.closing(S3Engine(address_of("of-one"), 100)) as alone:
        fill(alone, "a")
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="of-one is a store of one peer"):
                open_store(100, "of-one")
        assert contents(alone, "a") == {"a": make_value("a", 30)}
    with contextlib.closing(S3Engine(address_of("of-one"), 100)) as alone:
        assert alone.stat() == StoreStat(1, 30, 100, 0)


def test_of_two_layouts_that_come_at_once_none_overlooks_the_other(open_store, address_of):
    bucket = S3Bucket(address_of("at-once"))
    replace = bucket.replace

    def replace_late(name, value):
        s3_layouts.join(S3Bucket(address_of("at-once")))
        replace(name, value)

    bucket.replace = replace_late
    with pytest.raises(ConfigurationError, match="share"):
        s3_layouts.take_alone(bucket, b"token")
    fill(open_store(100, "at-once"), "a")


@pytest.mark.parametrize("mark", [b"", b"kvcodec-index-2\n", b"kvcodec-index-1\n" + bytes(32) + b"\n"])
def test_a_senseless_mark_is_refused(open_store, address_of, mark):
    prefix = f"senseless/{len(mark)}"
    S3Bucket(address_of(prefix)).replace("index", mark)
    with pytest.raises(ConfigurationError, match=f"{prefix}/index"):
        open_store(100, prefix)


def is_away(use, word):
    try:
        use()
    except StorageUnavailableError as error:
        return word in str(error)
    return False


def test_nobody_is_told_of_objects_while_the_bucket_is_away(open_store, monkeypatch):
    """Whoever was told would ask for them, and wait."""
    store = open_store(100, watch_s=0.02)
    fill(store, "a")

    def fail(name):
        raise StorageUnavailableError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(store._bucket, "get", fail)
        for use in (
            lambda: store.sizes([make_key("a")]),
            lambda: store.put(make_key("b"), bytes(30)),
            store.stat,
        ):
            wait_until(lambda use=use: is_away(use, "gone"))
    wait_until(lambda: not is_away(store.stat, "gone"))
    assert store.sizes([make_key("a")]) == [30]
    assert store.stat() == StoreStat(1, 30, 100, 0)


def test_another_store_in_the_place_of_this_one(open_store):
    """As when somebody has emptied the bucket: what the index has is in it no longer."""
    store = open_store(100, "emptied", watch_s=0.02)
    fill(store, "a")
    store._bucket.delete([*objects_in(store), "index"])
    wait_until(lambda: is_away(store.stat, "not the store"))
    after = open_store(100, "emptied")
    fill(after, "b")
    assert after.stat() == StoreStat(1, 30, 100, 0)
    assert is_away(store.stat, "not the store")


def test_redis_dies_and_comes_back(tmp_path, open_store):
    """The bucket still has all: with its index at once, without one it is counted anew."""
    durable = ("--appendonly", "yes", "--appendfsync", "always")
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(ValkeyProcess(tmp_path / "valkey", durable))
        store = open_store(1000, "redis-dies", f"redis://{process.address}", watch_s=0.1)
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
        process = stack.enter_context(process.restart())
        assert store.stat() == StoreStat(3, 90, 1000, 0)
        process.kill()
        for file in (tmp_path / "valkey").rglob("*.aof"):
            file.unlink()
        for file in (tmp_path / "valkey").rglob("*.manifest"):
            file.unlink()
        stack.enter_context(process.restart())
        fill(store, "d")
        assert contents(store, "abcd") == {name: make_value(name, 30) for name in "abcd"}
        assert store.stat() == StoreStat(4, 120, 1000, 0)


def test_nobody_there(open_store, seaweed):
    with pytest.raises(StorageUnavailableError, match=r"127\.0\.0\.1:1"):
        open_store(100, "no-redis", "redis://127.0.0.1:1")
    with pytest.raises(StorageUnavailableError, match="s3://kvcodec/nobody"):
        SharedS3Engine(
            S3Address.parse("//kvcodec/nobody?endpoint=http://127.0.0.1:1"), RedisAddress.parse("redis", "//h"), 100
        )


def test_a_commit_that_fails_gives_its_room_back(open_store, monkeypatch):
    store = open_store(100)
    run = store._index._connection.run

    def fail_commits(script, *rest):
        if script is redis_scripts.COMMIT:
            raise StorageUnavailableError("gone")
        return run(script, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(store._index._connection, "run", fail_commits)
        with pytest.raises(StorageUnavailableError, match="gone"):
            store.put(make_key("a"), bytes(100))
    assert objects_in(store) == {}
    assert store.put(make_key("b"), bytes(100)) is True


@pytest.mark.parametrize(
    "written",
    [
        "redis://u:p%40%2F@h:1/2?prefix=x",
        "redis%3A%2F%2Fu%3Ap%2540%252F%40h%3A1%2F2%3Fprefix%3Dx",
    ],
)
def test_an_index_is_written_as_it_is_or_encoded(written):
    address = S3Address.parse(f"//bucket/a?index={written}&region=eu")
    assert (address.prefix, address.region) == ("a", "eu")
    assert address.index_url == "redis://u:p%40%2F@h:1/2?prefix=x"
    assert "p%40" not in repr(address)
    scheme, _, location = address.index_url.partition(":")
    assert RedisAddress.parse(scheme, location) == RedisAddress((("h", 1),), False, 2, "x", False, "u", "p@/")
