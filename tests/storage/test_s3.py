import contextlib
import itertools
import threading
import time

import pytest
from store_kit import contents, fill

from sglang_kvcodec.errors import ConfigurationError, StorageUnavailableError
from sglang_kvcodec.storage.base import StoreStat
from sglang_kvcodec.storage.s3_bucket import S3Address
from sglang_kvcodec.storage.s3_engine import S3Engine
from sglang_kvcodec.testing.storage import StorageEngineContract, make_key, make_value

PREFIXES = (f"store/{number}" for number in itertools.count())


@pytest.fixture
def open_store(seaweed):
    with contextlib.ExitStack() as stack:

        def open_it(capacity_bytes, prefix=None, **options):
            address = S3Address.parse(f"//kvcodec/{prefix or next(PREFIXES)}?endpoint={seaweed.endpoint}")
            return stack.enter_context(contextlib.closing(S3Engine(address, capacity_bytes, **options)))

        yield open_it


class TestS3Engine(StorageEngineContract):
    @pytest.fixture
    def make_engine(self, open_store):
        return open_store


def test_objects_counts_and_order_outlive_the_peer(open_store):
    store = open_store(100, "kept")
    fill(store, "abcd")  # evicts a
    store.get(make_key("b"))
    store.close()
    store = open_store(100, "kept")
    assert store.stat() == StoreStat(3, 90, 100, 1)
    fill(store, "e")
    assert contents(store, "abcde") == {name: make_value(name, 30) for name in "bde"}
    assert store.stat() == StoreStat(3, 90, 100, 2)


def test_a_peer_that_was_killed_has_lost_the_newest_part_of_the_order(open_store):
    store = open_store(100, "killed")
    fill(store, "ab")
    store.get(make_key("a"))
    store.tidy()
    store.get(make_key("b"))
    fill(store, "c")
    # A new peer takes over, the first one is never closed.
    store = open_store(100, "killed")
    assert store.stat() == StoreStat(3, 90, 100, 0)
    fill(store, "d")
    assert set(contents(store, "abcd")) == set("acd")


@pytest.mark.parametrize("order", [b"", b"no order", b"kvcodec-order-1\n", b"kvcodec-order-1\n" + bytes(8 + 63)])
def test_a_senseless_order_is_none(open_store, order):
    prefix = f"senseless/{len(order)}"
    store = open_store(1000, prefix)
    fill(store, "abc")
    store._bucket.replace("order", order)
    store = open_store(1000, prefix)
    assert contents(store, "abc") == {name: make_value(name, 30) for name in "abc"}
    assert store.stat() == StoreStat(3, 90, 1000, 0)


def test_a_smaller_capacity_evicts_at_the_next_start(open_store):
    store = open_store(10_000, "shrinks")
    fill(store, range(100), 100)
    store.close()
    store = open_store(1_234, "shrinks")
    assert store.stat() == StoreStat(12, 1_200, 1_234, 88)
    store.close()
    store = open_store(5_000, "shrinks")
    assert set(contents(store, range(100))) == set(range(88, 100))


def test_more_than_one_listing_holds(open_store):
    count = 1_003
    store = open_store(10 * count, "many")
    fill(store, range(count), 3)
    store = open_store(10 * count, "many")
    assert store.stat() == StoreStat(count, 3 * count, 10 * count, 0)
    assert store.get(make_key(count - 1)) == make_value(count - 1, 3)


def test_the_last_peer_to_come_has_the_prefix(open_store):
    first = open_store(100, "taken", owner_check_s=0.05)
    fill(first, "a")
    second = open_store(100, "taken")
    first._watch.join(timeout=60)
    for use in (lambda: first.get(make_key("a")), lambda: first.put(make_key("b"), b"x"), first.stat):
        with pytest.raises(StorageUnavailableError, match="taken over"):
            use()
    first.close()
    assert contents(second, "a") == {"a": make_value("a", 30)}
    second.get(make_key("a"))
    second.close()
    assert open_store(100, "taken").stat().objects == 1


def test_what_an_old_owner_still_puts(open_store):
    """The first put of a key wins, whoever did it; tidying finds the others, and the capacity holds."""
    first, second = open_store(100, "both"), open_store(100, "both")
    first.put(make_key("a"), bytes(30))
    assert second.put(make_key("a"), b"another") is False
    assert second.get(make_key("a")) == bytes(30)
    first.put(make_key("b"), bytes(40))
    first.put(make_key("c"), bytes(30))
    fill(second, "d")
    assert second.stat() == StoreStat(2, 60, 100, 0)
    second.tidy()
    assert second.stat().stored_bytes <= 100
    assert second.stat().objects == len(contents(second, "abcd")) == 3


def test_objects_that_others_have_deleted_are_misses(open_store):
    store = open_store(100, "lost")
    fill(store, "abc")
    store._bucket.delete([f"objects/{make_key(name).hex()}" for name in "ab"])
    assert store.get(make_key("a")) is None
    assert store.get_range(make_key("b"), 3, 7) is None
    assert store.stat() == StoreStat(1, 30, 100, 0)
    assert store.put(make_key("a"), bytes(70)) is True


def test_foreign_names_are_left_alone(open_store):
    store = open_store(100, "foreign")
    names = ["objects/readme", f"objects/{make_key('a').hex()}0", "objects/deep/er"]
    for name in names:
        store._bucket.replace(name, bytes(1000))
    store = open_store(100, "foreign")
    assert store.stat() == StoreStat(0, 0, 100, 0)
    fill(store, "abcd")
    assert all(store._bucket.get(name) == bytes(1000) for name in names)


def test_a_store_that_fails_and_comes_back(open_store, monkeypatch):
    """What may have got there is deleted before its room is used again."""
    store = open_store(100, "fails")
    create, delete = store._bucket.create, store._bucket.delete

    def create_and_fail(name, value):
        create(name, value)
        raise StorageUnavailableError("timed out")

    def fail(*_):
        raise StorageUnavailableError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(store._bucket, "create", create_and_fail)
        patch.setattr(store._bucket, "delete", fail)
        with pytest.raises(StorageUnavailableError, match="timed out"):
            store.put(make_key("a"), bytes(60))
        with pytest.raises(StorageUnavailableError, match="gone"):
            store.put(make_key("b"), bytes(60))
    assert store.get(make_key("a")) is None
    deleted = []
    monkeypatch.setattr(store._bucket, "delete", lambda names: (deleted.extend(names), delete(names)))
    assert store.put(make_key("b"), bytes(60)) is True
    assert deleted == [f"objects/{make_key('a').hex()}"]
    assert store._bucket.head(deleted[0]) is None
    assert store.put(make_key("a"), bytes(40)) is True
    assert store.stat() == StoreStat(2, 100, 100, 0)


def test_nobody_is_told_of_objects_while_the_bucket_is_away(open_store, monkeypatch):
    """Whoever was told would ask for them, and wait."""
    store = open_store(100, owner_check_s=0.02)
    fill(store, "a")
    looked = threading.Event()

    def fail(name):
        looked.set()
        raise StorageUnavailableError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(store._bucket, "get", fail)
        assert looked.wait(60)
        for use in (lambda: store.sizes([make_key("a")]), store.stat):
            wait_until(lambda use=use: is_away(use))
    wait_until(lambda: not is_away(store.stat))
    assert store.sizes([make_key("a")]) == [30]
    assert store.stat() == StoreStat(1, 30, 100, 0)


def is_away(use):
    try:
        use()
    except StorageUnavailableError as error:
        return str(error) == "gone"
    return False


def wait_until(condition):
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_refusal_is_told(seaweed, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageUnavailableError, match="s3://kvcodec/refused"):
        S3Engine(S3Address.parse(f"//kvcodec/refused?endpoint={seaweed.endpoint}"), 100)


def test_nobody_there(seaweed):
    with pytest.raises(StorageUnavailableError, match="s3://kvcodec/nobody"):
        S3Engine(S3Address.parse("//kvcodec/nobody?endpoint=http://127.0.0.1:1"), 100)


@pytest.mark.parametrize(
    ("location", "address"),
    [
        ("//bucket", S3Address("bucket", "", None, None)),
        ("//b.u-cket/a/b/?region=eu", S3Address("b.u-cket", "a/b", None, "eu")),
        ("//bucket/a?endpoint=http://[::1]:9", S3Address("bucket", "a", "http://[::1]:9", None)),
    ],
)
def test_addresses(location, address):
    assert S3Address.parse(location) == address


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("", "BUCKET"),
        ("//B", "BUCKET"),
        ("//user:secret@bucket", "BUCKET"),
        ("//bucket/a//b", "BUCKET"),
        ("//bucket/a?x=1", "no option x"),
        ("//bucket/a?index=redis://u:a&b@h", "encode"),
        ("//bucket?endpoint=ftp://host", "endpoint"),
        ("//bucket?endpoint=http://u:p@host", "endpoint"),
    ],
)
def test_bad_addresses(location, says):
    with pytest.raises(ConfigurationError, match=says):
        S3Address.parse(location)
