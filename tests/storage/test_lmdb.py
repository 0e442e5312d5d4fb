import contextlib
import itertools
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import lmdb
import lmdb_child
import pytest
from store_kit import contents

from sglang_kvcodec.errors import ConfigurationError, StorageUnavailableError
from sglang_kvcodec.storage import lmdb_engine, lmdb_uses
from sglang_kvcodec.storage.base import StoreStat
from sglang_kvcodec.storage.lmdb_engine import LmdbEngine
from sglang_kvcodec.testing.storage import LruModel, StorageEngineContract, make_key, make_value

MIB = 1 << 20


@pytest.fixture
def open_store(tmp_path):
    """Opens the store of this test, again and again; what is still open at the end is closed."""
    opened = []

    def open_it(capacity_bytes=MIB, directory=tmp_path / "store", **options):
        opened.append(LmdbEngine(directory, capacity_bytes, **options))
        return opened[-1]

    yield open_it
    for engine in opened:
        engine.close()


class TestLmdbEngine(StorageEngineContract):
    @pytest.fixture
    def make_engine(self, tmp_path, open_store):
        numbers = iter(range(10**6))
        return lambda capacity_bytes: open_store(capacity_bytes, tmp_path / str(next(numbers)))


def test_objects_counts_and_order_outlive_the_process(open_store):
    store = open_store(100)
    for name in "abcd":
        store.put(make_key(name), make_value(name, 30))  # evicts a
    store.get(make_key("b"))
    store.close()

    store = open_store(100)
    assert store.stat() == StoreStat(3, 90, 100, 1)
    assert store.get(make_key("d")) == make_value("d", 30)
    store.put(make_key("e"), make_value("e", 30))
    assert contents(store, "abcde") == {name: make_value(name, 30) for name in "bde"}
    assert store.stat() == StoreStat(3, 90, 100, 2)


def test_uses_are_written_with_the_next_put(open_store, tmp_path):
    store = open_store(100)
    for name in "abc":
        store.put(make_key(name), bytes(30))
    store.get(make_key("a"))
    store.put(make_key("d"), bytes(10))
    # What a crash here would leave.
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    copy = open_store(100, tmp_path / "copy")
    copy.put(make_key("e"), bytes(30))
    assert set(contents(copy, "abcde")) == set("acde")


def test_uses_are_written_when_there_are_many_and_no_put(open_store, tmp_path, monkeypatch):
    monkeypatch.setattr(lmdb_uses, "USES_HELD", 2)
    store = open_store(90)
    for name in "abc":
        store.put(make_key(name), bytes(30))
    store.sizes([make_key("b"), make_key("a")])
    deadline_s = time.monotonic() + 60
    for attempt in itertools.count():
        # What a crash at this moment would leave: a copy in the middle of a commit has what was before it.
        shutil.copytree(tmp_path / "store", tmp_path / f"copy{attempt}")
        copy = open_store(90, tmp_path / f"copy{attempt}")
        copy.put(make_key("d"), bytes(60))
        if set(contents(copy, "abcd")) == set("bd"):
            break
        assert time.monotonic() < deadline_s


def test_no_read_waits_for_a_disk_that_takes_no_writes(open_store, monkeypatch):
    """However much is used meanwhile, and what is remembered of it stays bounded."""
    monkeypatch.setattr(lmdb_uses, "USES_HELD", 3)
    monkeypatch.setattr(lmdb_uses, "MOST_USES_HELD", 6)
    store = open_store(1000)
    names = "abcdefghij"
    for name in names:
        store.put(make_key(name), bytes(30))
    stuck, freed, writing = threading.Event(), threading.Event(), store._environment.writing

    @contextlib.contextmanager
    def stuck_writing():
        stuck.set()
        assert freed.wait(60)
        with writing() as transaction:
            yield transaction

    monkeypatch.setattr(store._environment, "writing", stuck_writing)
    try:
        store.sizes([make_key(name) for name in names])
        assert stuck.wait(60)
        for _ in range(3):
            for name in reversed(names):
                assert store.sizes([make_key(name)]) == [30]
                assert store.get(make_key(name)) == bytes(30)
        assert store._uses.held_uses <= 6
    finally:
        freed.set()
    # The ones that were used last are there to be kept; the order of the others may have been forgotten.
    store.put(make_key("k"), bytes(850))
    assert set(contents(store, names)) == set("abcde")


def test_reads_commit_nothing(open_store, tmp_path):
    store = open_store()
    store.put(make_key("a"), b"value")
    before = (tmp_path / "store" / "data.mdb").read_bytes()
    for _ in range(100):
        store.get(make_key("a"))
        store.sizes([make_key("a"), make_key("b")])
        store.put(make_key("a"), b"value")
        store.delete(make_key("b"))
        store.stat()
    assert (tmp_path / "store" / "data.mdb").read_bytes() == before


def test_a_smaller_capacity_evicts_at_the_next_start(open_store, monkeypatch):
    monkeypatch.setattr(lmdb_engine, "_EVICTIONS_PER_TRANSACTION", 7)
    store = open_store(10_000)
    for i in range(100):
        store.put(make_key(i), bytes(100))
    store.close()
    store = open_store(1_234)
    assert store.stat() == StoreStat(12, 1_200, 1_234, 88)
    assert contents(store, range(100)) == {i: bytes(100) for i in range(88, 100)}


@pytest.mark.parametrize("object_bytes", [100, 2_100, 100_000])
def test_the_capacity_binds_before_the_file_does(open_store, object_bytes):
    """The room of the data file suffices for a full store under churn, whatever LMDB's pages add."""
    count = 40
    store = open_store(count * object_bytes)
    for i in range(4 * count):
        store.put(make_key(i), bytes(object_bytes))
    assert store.stat() == StoreStat(count, count * object_bytes, count * object_bytes, 3 * count)


def test_a_full_data_file_evicts_and_goes_on(open_store, tmp_path):
    store = open_store(100 * MIB, max_file_bytes=2 * MIB)
    sizes_bytes = random.Random(5)
    for i in range(300):
        value = make_value(i, sizes_bytes.choice([10, 5_000, 90_000, 200_000]))
        assert store.put(make_key(i), value) is True
        assert store.get(make_key(i)) == value
    stat = store.stat()
    assert stat.objects + stat.evicted_objects == 300
    assert stat.stored_bytes > MIB // 2, "far more was evicted than the file needs"
    assert sum(len(value) for value in contents(store, range(300)).values()) == stat.stored_bytes
    assert (tmp_path / "store" / "data.mdb").stat().st_size <= 2 * MIB


def test_an_object_that_the_data_file_can_never_hold(open_store):
    store = open_store(100 * MIB, max_file_bytes=MIB)
    with pytest.raises(StorageUnavailableError, match="no room"):
        store.put(make_key("large"), bytes(2 * MIB))
    assert store.get(make_key("large")) is None
    assert store.put(make_key("small"), b"value") is True
    assert store.get(make_key("small")) == b"value"


# ---- crashes ----


def test_killed_while_it_puts_and_evicts(open_store, tmp_path):
    """Whatever the moment: the store is as after the last acknowledged put, or after the one that was under way."""
    capacity_bytes = 400_000
    model, first, choose = LruModel(capacity_bytes), 0, random.Random(11)
    for _ in range(10):
        child = subprocess.Popen(
            [sys.executable, lmdb_child.__file__, str(tmp_path / "store"), str(capacity_bytes), str(first)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        with child:
            acknowledged = [int(child.stdout.readline()) for _ in range(choose.randrange(1, 60))]
            child.kill()
            acknowledged += [int(line) for line in child.stdout if line.endswith(b"\n")]
        assert acknowledged == list(range(first, first + len(acknowledged)))
        for i in acknowledged:
            model.use(lmdb_child.nth_read(i))
            model.put(make_key(i), lmdb_child.nth_value(i))
        first += len(acknowledged)

        store = open_store(capacity_bytes)
        if store.get(make_key(first)) is not None:
            model.use(lmdb_child.nth_read(first))
            model.put(make_key(first), lmdb_child.nth_value(first))
            first += 1
        assert store.stat() == model.stat()
        for i in range(first + 2):
            assert store.get(make_key(i)) == model.objects.get(make_key(i))
        # These reads count as uses too.
        model.use([make_key(first)])
        for i in range(first + 2):
            model.use([make_key(i)])
        store.close()
    assert model.evicted_objects > 50, "the rounds were too short to evict"


def test_a_crash_before_the_first_transaction_leaves_a_usable_directory(open_store, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "owner.lock").touch()
    assert open_store().put(make_key("a"), b"value") is True


def test_a_read_that_must_not_wait(open_store):
    """It is refused while the data file grows and when the store is closed, and keeps nobody from either."""
    store = open_store(1000)
    store.put(make_key("a"), b"value")
    environment = store._environment
    with store.ranges_now() as get_range:
        assert bytes(get_range(make_key("a"), 1, 3)) == b"al"
        grower = threading.Thread(target=environment.allow_file, args=(1 << 30,))
        grower.start()
        while not environment._growing:
            time.sleep(0.001)
        with store.ranges_now() as other:
            assert other is None
    grower.join()
    with store.ranges_now() as get_range:
        assert bytes(get_range(make_key("a"), 0, 9)) == b"value"
    with environment._state, ThreadPoolExecutor(1) as threads:
        # Another thread is about to change something: who must not wait does not wait for that.
        assert threads.submit(lambda: store.ranges_now().__enter__()).result() is None
    store.close()
    with store.ranges_now() as get_range:
        assert get_range is None


def test_sizes_of_records_of_both_formats(open_store):
    store = open_store(10_000)
    keys = [make_key(name) for name in "abcd"]
    for size, key in enumerate(keys):
        store.put(key, bytes(size))
    assert store.sizes(keys) == [0, 1, 2, 3]
    with store._environment.writing() as transaction:
        meta = transaction._tables.meta
        for key in keys[1::2]:
            # As format 1 wrote it: without the time.
            transaction._transaction.put(key, transaction._transaction.get(key, db=meta)[:16], db=meta)
    assert store.sizes(keys) == [0, 1, 2, 3]
    assert store.sizes(keys[1::2]) == [1, 3]
    assert store.sizes([*keys, make_key("e")]) == [0, 1, 2, 3, None]
    assert store.sizes([]) == []


def test_lmdb_giving_up_is_survived(open_store, monkeypatch):
    """After a failed write of its root LMDB refuses all work; the engine opens it anew."""
    store = open_store()
    store.put(make_key("a"), b"value")
    environment = store._environment._environment

    class Refusing:
        close = environment.close

        def begin(self, write=False, buffers=False):
            raise lmdb.PanicError("as after a failed write of the meta page")

    monkeypatch.setattr(store._environment, "_environment", Refusing())
    with pytest.raises(StorageUnavailableError):
        store.get(make_key("a"))
    assert store.get(make_key("a")) == b"value"
    assert store.put(make_key("b"), b"other") is True


# ---- disks ----


def fill(store, expected):
    """Puts objects until the engine refuses one; gives the refused name."""
    for name in range(10_000):
        value = make_value(name, 70_000)
        try:
            store.put(make_key(name), value)
        except StorageUnavailableError:
            return name
        expected[name] = value
    raise AssertionError("the disk never became full")


def check_full_disk(store, make_room):
    expected = {}
    refused = fill(store, expected)
    assert len(expected) > 5
    for _ in range(3):
        with pytest.raises(StorageUnavailableError):
            store.put(make_key(refused), make_value(refused, 70_000))
    assert contents(store, range(refused + 1)) == expected
    assert store.stat().stored_bytes == 70_000 * len(expected)
    make_room()
    assert store.put(make_key(refused), make_value(refused, 70_000)) is True
    assert contents(store, range(refused + 1)) == {**expected, refused: make_value(refused, 70_000)}


def test_a_file_that_may_not_grow(open_store, tmp_path):
    """The same as a full disk to LMDB, and needs no right to mount one."""
    store = open_store(100 * MIB)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB + 1234, limits[1]))
    try:
        check_full_disk(store, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def small_disk(mount_disk):
    return mount_disk(3)


def test_a_full_disk(open_store, small_disk):
    other = small_disk / "other"
    other.write_bytes(bytes(300_000))
    store = open_store(100 * MIB, small_disk / "store")
    check_full_disk(store, other.unlink)
    store.close()
    assert open_store(100 * MIB, small_disk / "store").stat().evicted_objects == 0


@pytest.mark.parametrize("free_kib", [0, 64, 128, 132, 136, 140, 148, 160])
def test_a_full_disk_at_the_first_start(open_store, small_disk, free_kib):
    """Wherever the room ends while the files are made: a refusal or a working store, and no harm later."""
    other, room = small_disk / "other", small_disk / "room"
    room.write_bytes(bytes(free_kib << 10))
    with other.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    room.unlink()

    def start_and_put():
        with contextlib.closing(open_store(MIB, small_disk / "store")) as store:
            store.put(make_key("a"), bytes(100_000))

    with pytest.raises(StorageUnavailableError):
        start_and_put()
    other.unlink()
    store = open_store(MIB, small_disk / "store")
    assert store.get(make_key("a")) is None
    assert store.put(make_key("a"), b"value") is True


def test_a_read_only_disk(open_store, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageUnavailableError, match="Read-only"):
        open_store(MIB, small_disk / "store")


def test_a_directory_that_may_not_be_written(tmp_path):
    """In a process without root's rights, for root may write everywhere."""
    directory = tmp_path / "store"
    directory.mkdir()
    directory.chmod(0o555)
    code = """
import os, sys
sys.path[:0] = sys.argv[2].split(os.pathsep)
from sglang_kvcodec.storage import lmdb_engine, open_engine
from sglang_kvcodec.errors import StorageUnavailableError
os.chdir(sys.argv[1])
if os.geteuid() == 0:
    os.setuid(65534)
try:
    open_engine("lmdb:.", 1000)
except StorageUnavailableError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, directory, os.pathsep.join(p for p in sys.path if p)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Permission denied" in result.stdout, result.stderr


# ---- whose directory ----


def test_a_second_engine_is_refused_until_the_first_is_closed(open_store, tmp_path):
    first = open_store()
    first.put(make_key("a"), b"value")
    code = f"""
from sglang_kvcodec.storage import open_engine
from sglang_kvcodec.errors import StorageUnavailableError
try:
    print(open_engine("lmdb:{tmp_path / "store"}", 1000).stat().objects)
except StorageUnavailableError as error:
    print(error)
"""

    def second_process():
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env, timeout=120).stdout

    assert "in use by another" in second_process()
    with pytest.raises(StorageUnavailableError, match="in use by another"):
        open_store()
    assert first.get(make_key("a")) == b"value"
    first.close()
    assert second_process() == "1\n"


def test_a_refused_start_does_not_keep_the_directory(open_store, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "data.mdb").write_bytes(b"not LMDB's")
    with pytest.raises(ConfigurationError):
        open_store()
    (tmp_path / "store" / "data.mdb").unlink()
    assert open_store().put(make_key("a"), b"value") is True


def test_directories_of_something_else_are_refused_and_left_alone(open_store, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigurationError, match="other files"):
        open_store()
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_directory_is_refused(open_store, tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(ConfigurationError, match="not a directory"):
        open_store()


@pytest.mark.parametrize("damage", [b"", b"\0" * 8192, b"some other program's file" * 1000])
def test_a_data_file_of_something_else(open_store, tmp_path, damage):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "data.mdb").write_bytes(damage)
    if damage:
        with pytest.raises(ConfigurationError, match="not an LMDB file"):
            open_store()
    else:
        assert open_store().put(make_key("a"), b"value") is True


def change_mark(directory, version):
    with lmdb.open(str(directory), max_dbs=3) as environment, environment.begin(write=True) as transaction:
        if version is None:
            transaction.delete(b"sglang-kvcodec store")
        else:
            transaction.put(b"sglang-kvcodec store", version)


@pytest.mark.parametrize(("version", "says"), [(None, "another program"), (b"3", "format 3, this version .* reads 2")])
def test_lmdb_data_of_another_kind_is_refused(open_store, tmp_path, version, says):
    store = open_store()
    store.put(make_key("a"), b"value")
    store.close()
    change_mark(tmp_path / "store", version)
    with pytest.raises(ConfigurationError, match=says):
        open_store()
    change_mark(tmp_path / "store", b"2")
    assert open_store().get(make_key("a")) == b"value"


def test_a_store_of_format_1_is_taken_over(open_store, tmp_path, monkeypatch):
    """Its records have no time of the put; all else goes on, and what is touched keeps its place in the order."""
    monkeypatch.setattr(lmdb_engine.time, "time", lambda: 1234.5)
    store = open_store(100)
    for name in "abc":
        store.put(make_key(name), make_value(name, 30))
    store.close()
    environment = lmdb.open(str(tmp_path / "store"), max_dbs=3)
    with environment:
        meta = environment.open_db(b"meta")
        with environment.begin(write=True) as transaction:
            for name in "abc":
                record = transaction.get(make_key(name), db=meta)
                transaction.put(make_key(name), record[:16], db=meta)
    change_mark(tmp_path / "store", b"1")

    store = open_store(100)
    assert store.stored_at_s([make_key(name) for name in "abcd"]) == [1234.5, 1234.5, 1234.5, None]
    store.get(make_key("a"))
    store.put(make_key("d"), bytes(40))
    assert contents(store, "abcd") == {"a": make_value("a", 30), "d": bytes(40)} | {"c": make_value("c", 30)}
    assert store.stat() == StoreStat(3, 100, 100, 1)
    store.close()
    environment = lmdb.open(str(tmp_path / "store"), max_dbs=3)
    with environment, environment.begin() as transaction:
        assert transaction.get(b"sglang-kvcodec store") == b"2"


def test_the_file_grows_with_the_capacity(tmp_path):
    """Beyond what it might have grown to when it was opened: 256 MiB more than twice the capacity."""
    with contextlib.closing(LmdbEngine(tmp_path / "store", 1 << 20)) as store:
        store.resize(400 << 20)
        for number in range(5):
            store.put(make_key(number), make_value(number, 64 << 20))
        assert store.stat() == StoreStat(5, 320 << 20, 400 << 20, 0)
        assert (tmp_path / "store" / "data.mdb").stat().st_size > 300 << 20
    with contextlib.closing(LmdbEngine(tmp_path / "store", 400 << 20)) as store:
        assert store.get(make_key(3)) == make_value(3, 64 << 20)
