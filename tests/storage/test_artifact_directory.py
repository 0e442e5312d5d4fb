import itertools
import os
import resource
import shutil
import subprocess
import sys
import threading

import pytest

from sglang_kvcodec.config import MAX_ARTIFACT_BYTES
from sglang_kvcodec.errors import (
    CapacityError,
    ChecksumError,
    ConfigurationError,
    FormatError,
    NotFoundError,
    StorageUnavailableError,
    TruncatedError,
)
from sglang_kvcodec.format.digest import artifact_digest
from sglang_kvcodec.storage import artifact_directory
from sglang_kvcodec.storage.artifact_directory import DirectoryArtifactStore
from sglang_kvcodec.storage.artifacts import ArtifactStat
from sglang_kvcodec.testing.artifacts import ArtifactStoreContract, entries_of, make_artifact, make_model, read_all

MODEL = make_model("m")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "deep" / "calibrations"


@pytest.fixture
def open_store(root):
    """Opens the store of this test, again and again; what is still open at the end is closed."""
    opened = []

    def open_it(capacity_bytes=1 << 20, directory=root):
        opened.append(DirectoryArtifactStore(directory, capacity_bytes))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


class TestDirectoryArtifactStore(ArtifactStoreContract):
    @pytest.fixture
    def make_store(self, tmp_path, open_store):
        numbers = itertools.count()
        return lambda capacity_bytes: open_store(capacity_bytes, tmp_path / str(next(numbers)))


def names(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def file_of(root, model, artifact):
    return root / model.hex() / artifact_digest(artifact).hex()


def test_files_and_their_names(open_store, root):
    store = open_store()
    first, second = make_artifact("first", 10), make_artifact("second", 300_007)
    store.put(MODEL, second)
    store.put(MODEL, first)
    current = f"{MODEL.hex()}/current"
    assert names(root) == sorted(
        ["owner.lock", current, *(f"{MODEL.hex()}/{artifact_digest(each).hex()}" for each in (first, second))]
    )
    assert (root / current).read_text() == artifact_digest(first).hex() + "\n"
    assert file_of(root, MODEL, second).read_bytes() == second
    for artifact in (first, second):
        store.delete(MODEL, artifact_digest(artifact))
    assert names(root) == ["owner.lock"]
    assert not (root / MODEL.hex()).exists()


def test_all_is_there_after_a_restart(open_store):
    store = open_store()
    artifacts = [make_artifact(i, 101 + i) for i in range(3)]
    for artifact in (*artifacts, artifacts[0]):
        store.put(MODEL, artifact)
    store.put(make_model("n"), artifacts[1])
    before = store.entries()
    store.close()
    store = open_store()
    assert store.entries() == before
    assert store.stat() == ArtifactStat(4, sum(map(len, artifacts)) + len(artifacts[1]), 1 << 20)
    assert read_all(store, MODEL) == artifacts[0]
    store.delete(MODEL, artifact_digest(artifacts[0]))
    store.close()
    assert read_all(open_store(), MODEL) == artifacts[2]


@pytest.mark.parametrize("content", [b"", b"\0" * 65, b"A" * 64 + b"\n", b"0" * 64 + b"\n", b"../" * 30, None])
def test_a_useless_current_file(open_store, root, content):
    """The artifact whose file is newest is current then."""
    store = open_store()
    artifacts = [make_artifact(i, 101 + i) for i in range(3)]
    for artifact in artifacts:
        store.put(MODEL, artifact)
    store.close()
    for age_s, artifact in zip((2, 0, 1), artifacts, strict=True):
        os.utime(file_of(root, MODEL, artifact), (1_700_000_000 - age_s, 1_700_000_000 - age_s))
    current = root / MODEL.hex() / "current"
    if content is None:
        current.unlink()
    else:
        current.write_bytes(content)
    store = open_store()
    assert read_all(store, MODEL) == artifacts[1]
    store.put(MODEL, artifacts[2])
    store.close()
    assert read_all(open_store(), MODEL) == artifacts[2]


def test_files_of_others_are_left_alone(open_store, root):
    store = open_store()
    digest = store.put(MODEL, b"artifact")
    store.close()
    strange = ["notes.txt", "x.part", "abc/def", f"{MODEL.hex()}/notes", f"{MODEL.hex()}/{'A' * 64}", f"{'b' * 64}"]
    for name in strange:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("precious")
    (root / MODEL.hex() / ("c" * 64)).symlink_to(root / "notes.txt")
    (root / MODEL.hex() / ("d" * 64)).mkdir()
    store = open_store()
    assert entries_of(store) == [(MODEL, digest, 8, True)]
    assert store.delete(MODEL, digest) is True
    for name in strange:
        assert (root / name).read_text() == "precious"


# ---- crashes ----


def crash_images(monkeypatch, root, images, change):
    """Runs ``change`` and keeps a copy of the directory before each of its steps on the disk, and one after it."""
    made = []
    is_copying = False

    def keep():
        nonlocal is_copying
        if is_copying:  # the copy takes steps of its own
            return
        is_copying = True
        made.append(images / str(len(made)))
        shutil.copytree(root, made[-1])
        is_copying = False

    def stepping(function):
        def step(*args, **kwargs):
            keep()
            return function(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        for name in ("open", "write", "fsync", "fdatasync", "rename", "unlink", "mkdir", "rmdir", "utime"):
            patch.setattr(os, name, stepping(getattr(os, name)))
        change()
    keep()
    return made


def test_a_crash_at_any_step_of_a_put(open_store, root, tmp_path, monkeypatch):
    old, new = make_artifact("old", 1009), make_artifact("new", 2_500_009)
    store = open_store(1 << 22)
    store.put(MODEL, old)
    images = crash_images(monkeypatch, root, tmp_path / "images", lambda: store.put(MODEL, new))
    assert len(images) > 8
    seen = []
    for image in images:
        found = open_store(1 << 22, image)
        seen.append(read_all(found, MODEL))
        assert read_all(found, MODEL, artifact_digest(old)) == old
        assert read_all(found, MODEL, artifact_digest(new)) in (None, new)
        assert not [name for name in names(image) if name.endswith(".part")]
        assert found.stat().stored_bytes == sum(entry.size_bytes for entry in found.entries())
        found.put(MODEL, new)
        assert read_all(found, MODEL) == new
        assert found.stat() == ArtifactStat(2, len(old) + len(new), 1 << 22)
    # Old at first, new in the end, and once new never old again.
    assert seen == sorted(seen, key=lambda artifact: artifact == new)
    assert (seen[0], seen[-1]) == (old, new)


def test_a_crash_at_any_step_of_the_first_put_of_a_model(open_store, root, tmp_path, monkeypatch):
    store = open_store()
    images = crash_images(monkeypatch, root, tmp_path / "images", lambda: store.put(MODEL, b"artifact"))
    seen = [read_all(open_store(1 << 20, image), MODEL) for image in images]
    assert seen == sorted(seen, key=lambda artifact: artifact is not None)
    assert (seen[0], seen[-1]) == (None, b"artifact")


def test_a_crash_at_any_step_of_a_delete(open_store, root, tmp_path, monkeypatch):
    store = open_store()
    for artifact in (b"old", b"new"):
        store.put(MODEL, artifact)
    digest = artifact_digest(b"new")
    images = crash_images(monkeypatch, root, tmp_path / "images", lambda: store.delete(MODEL, digest))
    seen = [read_all(open_store(1 << 20, image), MODEL) for image in images]
    assert seen == sorted(seen, key=lambda artifact: artifact == b"old")
    assert (seen[0], seen[-1]) == (b"new", b"old")


def test_bytes_are_on_the_disk_before_the_name_is(open_store, monkeypatch):
    monkeypatch.setattr(artifact_directory, "_SYNC_EVERY_BYTES", 1 << 20)
    steps = []

    def noting(name):
        function = getattr(os, name)

        def step(*args, **kwargs):
            steps.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(os, name, step)

    for name in ("fsync", "fdatasync", "rename"):
        noting(name)
    open_store(1 << 23).put(MODEL, bytes((3 << 20) + 1))
    # The chunks as they come; artifact, directory of the model, `current`; both names, and the directory they are in.
    assert steps[-7:] == ["fdatasync", "fsync", "fsync", "fsync", "rename", "rename", "fsync"]
    assert steps.count("fdatasync") == 3


def test_a_writer_that_never_ends_leaves_a_file_that_the_next_start_removes(open_store, root):
    store = open_store()
    writer = store.receive(MODEL, bytes(32), 10)
    writer.write(b"12345")
    assert len(names(root)) == 2
    store.close()
    assert entries_of(open_store()) == []
    assert names(root) == ["owner.lock"]
    writer.abort()


# ---- damage ----


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda data: data[:-1], TruncatedError),
        (lambda data: b"", TruncatedError),
        (lambda data: data + b"x", TruncatedError),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], ChecksumError),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), ChecksumError),
        (lambda data: None, TruncatedError),
    ],
)
@pytest.mark.parametrize("restarted", [False, True])
def test_a_damaged_file_is_never_given_whole_and_is_removed(open_store, root, damage, error, restarted):
    store = open_store()
    good, bad = make_artifact("good", 500), make_artifact("bad", 100_003)
    for artifact in (good, bad):
        store.put(MODEL, artifact)
    path = file_of(root, MODEL, bad)
    content = damage(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    if restarted:
        store.close()
        store = open_store()
    if content or not restarted:
        reader = store.open(MODEL, artifact_digest(bad))
        received = []
        # After a restart it has the size of its file; that it has not the digest is what shows.
        with pytest.raises(FormatError) as caught:
            received += iter(lambda: reader.read(1000), b"")
        assert isinstance(caught.value, error) or restarted
        assert len(b"".join(received)) < reader.size_bytes
        assert reader.read(1000) == b""
        assert not path.exists()
    assert store.open(MODEL, artifact_digest(bad)) is None
    assert store.stat() == ArtifactStat(1, 500, 1 << 20)
    assert read_all(store, MODEL) == good
    store.put(MODEL, bad)
    assert read_all(store, MODEL) == bad


@pytest.mark.parametrize("size_bytes", [0, MAX_ARTIFACT_BYTES + 1])
def test_a_file_of_a_size_that_no_artifact_has(open_store, root, caplog, size_bytes):
    """It is not even listed, for a client would not believe the list."""
    store = open_store()
    artifact = make_artifact("a", 100)
    store.put(MODEL, artifact)
    store.close()
    os.truncate(file_of(root, MODEL, artifact), size_bytes)
    store = open_store()
    assert "can't be a calibration" in caplog.text
    assert store.stat() == ArtifactStat(0, 0, 1 << 20)
    assert store.current(MODEL) is None
    store.put(MODEL, artifact)
    assert read_all(store, MODEL) == artifact


def test_a_damaged_file_that_was_put_anew_in_between_is_kept(open_store, root):
    store = open_store()
    artifact = make_artifact("a", 1000)
    store.put(MODEL, artifact)
    file_of(root, MODEL, artifact).write_bytes(bytes(1000))
    reader = store.open(MODEL)
    reader.read(1)
    store.put(MODEL, artifact)
    with pytest.raises(ChecksumError):
        list(iter(lambda: reader.read(500), b""))
    assert read_all(store, MODEL) == artifact


def test_one_that_is_deleted_before_the_first_read_is_not_damaged(open_store):
    store = open_store()
    digest = store.put(MODEL, b"artifact")
    reader = store.open(MODEL)
    store.delete(MODEL, digest)
    with pytest.raises(NotFoundError):
        reader.read(100)


def test_a_read_of_nothing_is_not_taken_for_damage(open_store):
    store = open_store()
    store.put(MODEL, b"artifact")
    with pytest.raises(ValueError, match="no bytes"):
        store.open(MODEL).read(0)
    assert read_all(store, MODEL) == b"artifact"


# ---- room ----


def test_a_smaller_capacity_at_the_next_start(open_store, caplog):
    store = open_store(1000)
    digests = [store.put(MODEL, make_artifact(i, 300)) for i in range(3)]
    store.close()
    store = open_store(500)
    assert "900 bytes of calibrations, more than the 500" in caplog.text
    assert store.stat() == ArtifactStat(3, 900, 500)
    with pytest.raises(CapacityError):
        store.put(MODEL, b"x")
    assert read_all(store, MODEL) == make_artifact(2, 300)
    store.put(MODEL, make_artifact(0, 300))
    for digest in digests[:2]:
        store.delete(MODEL, digest)
    store.put(MODEL, make_artifact(3, 200))


def test_a_file_that_may_not_grow(open_store, root):
    """The same as a full disk to the store, and needs no right to mount one."""
    store = open_store(1 << 30)
    small, large = make_artifact("small", 50_000), make_artifact("large", 3_000_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        store.put(MODEL, small)
        for _ in range(2):
            with pytest.raises(StorageUnavailableError, match="File too large"):
                store.put(MODEL, large)
        assert read_all(store, MODEL) == small
        assert store.stat() == ArtifactStat(1, 50_000, 1 << 30)
        assert not [name for name in names(root) if name.endswith(".part")]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    store.put(MODEL, large)
    assert read_all(store, MODEL) == large


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_disk_that_fails_at_the_last_step(open_store, root, monkeypatch, failing):
    """Whichever call of the commit it is: nothing of the artifact is visible, then or after a restart."""
    original = getattr(os, failing)
    for nth in itertools.count():
        store = open_store()
        calls = itertools.count()

        def fail(*args, calls=calls, nth=nth):
            if next(calls) == nth:
                raise OSError(5, "Input/output error")
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, failing, fail)
            try:
                store.put(MODEL, b"artifact")
            except StorageUnavailableError as error:
                failed = str(error)
            else:
                break
        assert failed.endswith("Input/output error")
        assert store.open(MODEL) is None
        assert store.stat() == ArtifactStat(0, 0, 1 << 20)
        store.close()
        assert [name for name in names(root) if not name.endswith("current")] == ["owner.lock"]
    assert nth >= 2
    assert read_all(store, MODEL) == b"artifact"


# ---- whose directory ----


def test_a_second_store_is_refused_until_the_first_is_closed(open_store, root):
    first = open_store()
    writer = first.receive(MODEL, artifact_digest(b"artifact"), 8)
    writer.write(b"artifact")
    with pytest.raises(StorageUnavailableError, match="in use by another"):
        open_store()
    code = f"""
import pathlib
from sglang_kvcodec.storage.artifact_directory import DirectoryArtifactStore
try:
    DirectoryArtifactStore(pathlib.Path({str(root)!r}), 1000)
except Exception as error:
    print(type(error).__name__)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=env, timeout=120).stdout == (
        "StorageUnavailableError\n"
    )
    # What the others tried has not disturbed it.
    writer.commit()
    assert read_all(first, MODEL) == b"artifact"
    first.close()
    assert read_all(open_store(), MODEL) == b"artifact"


def test_a_file_in_place_of_the_directory(open_store, root):
    root.parent.mkdir()
    root.write_text("a file")
    with pytest.raises(ConfigurationError, match="not a directory"):
        open_store()


def test_an_abort_waits_for_the_write_under_way(open_store, root, monkeypatch):
    store = open_store()
    writer = store.receive(MODEL, bytes(32), 10)
    reached, opened = threading.Event(), threading.Event()
    original = os.write

    def slow(*args):
        reached.set()
        opened.wait()
        return original(*args)

    monkeypatch.setattr(os, "write", slow)
    writing = threading.Thread(target=writer.write, args=(b"12345",))
    writing.start()
    reached.wait()
    aborting = threading.Thread(target=writer.abort)
    aborting.start()
    assert len(names(root)) == 2
    opened.set()
    writing.join()
    aborting.join()
    assert names(root) == ["owner.lock"]
