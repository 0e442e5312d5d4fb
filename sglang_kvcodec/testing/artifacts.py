"""What every store of calibration artifacts must do, as tests. A new store is one subclass with one fixture.

Needs pytest and hypothesis (the ``dev`` extra). For readable failures, before the import:
``pytest.register_assert_rewrite("sglang_kvcodec.testing.artifacts")``.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_kvcodec.config import MAX_ARTIFACT_BYTES
from sglang_kvcodec.errors import (
    CapacityError,
    ChecksumError,
    FormatError,
    NotFoundError,
    StorageUnavailableError,
    TruncatedError,
)
from sglang_kvcodec.format.digest import artifact_digest
from sglang_kvcodec.storage import artifact_index
from sglang_kvcodec.storage.artifacts import ArtifactStat, ArtifactStore
from sglang_kvcodec.testing.storage import make_value

ArtifactStoreFactory = Callable[[int], ArtifactStore]
"""Capacity in bytes -> a new, empty store."""

_THREADS = 4


def make_model(name: object) -> bytes:
    """A model digest, different for every name."""
    return hashlib.sha256(repr(name).encode()).digest()


make_artifact = make_value
"""``(name, size_bytes)`` -> bytes that no other name gets."""


def read_all(store: ArtifactStore, model_digest: bytes, digest: bytes | None = None, step: int = 7919) -> bytes | None:
    """An artifact, read in steps of ``step`` bytes; None where there is none."""
    reader = store.open(model_digest, digest)
    if reader is None:
        return None
    try:
        pieces = list(iter(lambda: reader.read(step), b""))
    except NotFoundError:
        return None
    finally:
        reader.close()
    assert all(len(piece) <= step for piece in pieces)
    content = b"".join(pieces)
    assert len(content) == reader.size_bytes
    assert artifact_digest(content) == reader.digest
    return content


class ArtifactModel:
    """What a store must hold after the same calls, written as plainly as possible."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.models: dict[bytes, list[bytes]] = {}

    @property
    def artifacts(self) -> list[bytes]:
        """All of all models."""
        return [artifact for of_model in self.models.values() for artifact in of_model]

    def put(self, model: bytes, artifact: bytes) -> bool:
        """Whether there was room for it."""
        of_model = self.models.setdefault(model, [])
        if artifact in of_model:
            of_model.remove(artifact)
        elif sum(map(len, self.artifacts)) + len(artifact) > self.capacity_bytes:
            return False
        of_model.append(artifact)
        return True

    def delete(self, model: bytes, artifact: bytes) -> bool:
        """Whether it was there."""
        of_model = self.models.get(model, [])
        if artifact not in of_model:
            return False
        of_model.remove(artifact)
        return True

    def entries(self) -> list[tuple[bytes, bytes, int, bool]]:
        """As a store's, without the time."""
        return [
            (model, artifact_digest(artifact), len(artifact), artifact is of_model[-1])
            for model, of_model in sorted(self.models.items())
            for artifact in of_model
        ]


def entries_of(store: ArtifactStore) -> list[tuple[bytes, bytes, int, bool]]:
    """A store's entries without the time."""
    return [(e.model_digest, e.digest, e.size_bytes, e.is_current) for e in store.entries()]


_MODEL_CAPACITY_BYTES = 100
_MODELS = [make_model(i) for i in range(2)]
_ARTIFACTS = [make_artifact(i, size_bytes) for i, size_bytes in enumerate([1, 17, 30, 31, 37, 53, 101])]
_operations = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "delete", "break off"]),
        st.sampled_from(_MODELS),
        st.sampled_from(_ARTIFACTS),
    ),
    max_size=30,
)


class ArtifactStoreContract:
    """Subclass it as ``Test...`` and define the fixture ``make_store``."""

    @pytest.fixture
    def make_store(self) -> ArtifactStoreFactory:
        """Makes new, empty stores; closes them after the test."""
        raise NotImplementedError("define the fixture make_store")

    def test_an_empty_store(self, make_store: ArtifactStoreFactory) -> None:
        """Nothing is there."""
        store = make_store(1000)
        assert store.current(make_model("m")) is None
        assert store.open(make_model("m")) is None
        assert store.open(make_model("m"), bytes(32)) is None
        assert store.delete(make_model("m"), bytes(32)) is False
        assert store.entries() == []
        assert store.stat() == ArtifactStat(0, 0, 1000)

    @pytest.mark.parametrize("size_bytes", [1, 4095, 65_537, 3_000_001])
    def test_artifacts_come_back_whole(self, make_store: ArtifactStoreFactory, size_bytes: int) -> None:
        """Of any size, up to exactly the capacity, in pieces of any size."""
        store = make_store(size_bytes)
        artifact = make_artifact("a", size_bytes)
        assert store.put(make_model("m"), artifact) == artifact_digest(artifact)
        for step in (1 << 22, 65_537, max(1, size_bytes // 3)):
            assert read_all(store, make_model("m"), step=step) == artifact
        assert read_all(store, make_model("m"), artifact_digest(artifact)) == artifact
        assert store.stat() == ArtifactStat(1, size_bytes, size_bytes)

    def test_written_in_pieces(self, make_store: ArtifactStoreFactory) -> None:
        """Nothing is visible before the commit; buffers of any kind are taken, and may be used again at once."""
        store = make_store(1000)
        artifact = make_artifact("a", 101)
        digest = artifact_digest(artifact)
        writer = store.receive(make_model("m"), digest, 101)
        piece = bytearray(artifact[:50])
        writer.write(piece)
        piece[:] = bytes(50)
        writer.write(memoryview(artifact)[50:100])
        writer.write(artifact[100:])
        assert store.open(make_model("m"), digest) is None
        assert store.entries() == []
        writer.commit()
        writer.abort()
        assert read_all(store, make_model("m")) == artifact

    def test_the_one_put_last_is_current(self, make_store: ArtifactStoreFactory) -> None:
        """A second put of one that is there makes it current again; models do not mix."""
        store = make_store(1000)
        first, second = make_artifact("first", 10), make_artifact("second", 11)
        for artifact in (first, second):
            store.put(make_model("m"), artifact)
        store.put(make_model("n"), first)
        assert store.current(make_model("m")) == artifact_digest(second)
        assert read_all(store, make_model("m")) == second
        assert read_all(store, make_model("m"), artifact_digest(first)) == first
        store.put(make_model("m"), first)
        assert store.current(make_model("m")) == artifact_digest(first)
        assert store.current(make_model("n")) == artifact_digest(first)
        assert store.stat() == ArtifactStat(3, 31, 1000)

    def test_after_a_delete_the_one_before_is_current(self, make_store: ArtifactStoreFactory) -> None:
        """Down to none."""
        store = make_store(1000)
        digests = [store.put(make_model("m"), make_artifact(i, 10 + i)) for i in range(3)]
        assert store.delete(make_model("m"), digests[2]) is True
        assert store.current(make_model("m")) == digests[1]
        assert store.delete(make_model("m"), digests[0]) is True
        assert store.current(make_model("m")) == digests[1]
        assert store.delete(make_model("m"), digests[1]) is True
        assert store.current(make_model("m")) is None
        assert store.delete(make_model("m"), digests[1]) is False
        assert store.stat() == ArtifactStat(0, 0, 1000)

    def test_entries_tell_when(self, make_store: ArtifactStoreFactory) -> None:
        """And in which order: by model, then by time."""
        store = make_store(1000)
        for i in range(3):
            store.put(make_model("m"), make_artifact(i, 5))
        times = [entry.stored_at_ms for entry in store.entries()]
        assert times == sorted(times)
        assert times[0] > 1_600_000_000_000

    def test_nothing_is_evicted(self, make_store: ArtifactStoreFactory) -> None:
        """What does not fit is refused, with all that is there left as it is, until something is deleted."""
        store = make_store(100)
        digest = store.put(make_model("m"), make_artifact("a", 60))
        with pytest.raises(CapacityError, match="60 of 100"):
            store.put(make_model("n"), make_artifact("b", 41))
        store.put(make_model("n"), make_artifact("b", 40))
        assert store.stat() == ArtifactStat(2, 100, 100)
        store.put(make_model("m"), make_artifact("a", 60))
        store.delete(make_model("m"), digest)
        store.put(make_model("o"), make_artifact("c", 60))
        assert store.stat() == ArtifactStat(2, 100, 100)

    def test_what_is_on_its_way_has_its_place(self, make_store: ArtifactStoreFactory) -> None:
        """Two that fit only one at a time can't both begin; a broken one gives its place back."""
        store = make_store(100)
        artifact = make_artifact("a", 60)
        writer = store.receive(make_model("m"), artifact_digest(artifact), 60)
        with pytest.raises(CapacityError):
            store.receive(make_model("n"), bytes(32), 41)
        writer.write(artifact[:59])
        writer.abort()
        writer.abort()
        with pytest.raises(StorageUnavailableError):
            writer.write(artifact[59:])
        with pytest.raises(StorageUnavailableError):
            writer.commit()
        store.put(make_model("m"), artifact)
        assert store.stat() == ArtifactStat(1, 60, 100)

    def test_one_that_is_deleted_while_it_comes_again(self, make_store: ArtifactStoreFactory) -> None:
        """It needs room of its own then, and may not find it."""
        store = make_store(100)
        artifact = make_artifact("a", 60)
        digest = store.put(make_model("m"), artifact)
        writers = [store.receive(make_model("m"), digest, 60) for _ in range(2)]
        for writer in writers:
            writer.write(artifact)
        store.delete(make_model("m"), digest)
        writers[0].commit()
        assert read_all(store, make_model("m")) == artifact
        store.delete(make_model("m"), digest)
        store.put(make_model("n"), make_artifact("b", 41))
        with pytest.raises(CapacityError):
            writers[1].commit()
        writers[1].abort()
        assert store.current(make_model("m")) is None
        store.put(make_model("n"), make_artifact("c", 59))
        assert store.stat() == ArtifactStat(2, 100, 100)

    def test_too_many(self, make_store: ArtifactStoreFactory, monkeypatch: pytest.MonkeyPatch) -> None:
        """However small they are."""
        monkeypatch.setattr(artifact_index, "MAX_ARTIFACTS", 3)
        store = make_store(1000)
        for i in range(3):
            store.put(make_model(i), b"x")
        with pytest.raises(CapacityError, match="3 calibrations"):
            store.put(make_model(3), b"x")
        store.put(make_model(2), b"x")
        store.delete(make_model(0), artifact_digest(b"x"))
        store.put(make_model(3), b"x")

    @pytest.mark.parametrize("size_bytes", [-1, 0, MAX_ARTIFACT_BYTES + 1, 1 << 64])
    def test_sizes_that_no_artifact_has(self, make_store: ArtifactStoreFactory, size_bytes: int) -> None:
        """Refused before anything comes."""
        with pytest.raises(FormatError, match="bytes"):
            make_store(1 << 70).receive(make_model("m"), bytes(32), size_bytes)

    @pytest.mark.parametrize("name", [b"", bytes(31), bytes(33), b"../../../../../etc/passwd", b"a" * 64])
    def test_names_that_are_none(self, make_store: ArtifactStoreFactory, name: bytes) -> None:
        """A digest has 32 bytes; nothing else ever becomes the name of a file."""
        store = make_store(1000)
        for use in (
            lambda: store.receive(name, bytes(32), 10),
            lambda: store.receive(bytes(32), name, 10),
            lambda: store.open(name),
            lambda: store.open(bytes(32), name),
            lambda: store.current(name),
            lambda: store.delete(name, bytes(32)),
            lambda: store.delete(bytes(32), name),
        ):
            with pytest.raises(FormatError, match="32 bytes"):
                use()

    def test_bytes_that_are_not_what_was_announced(self, make_store: ArtifactStoreFactory) -> None:
        """Fewer, more, others, or none at all: nothing becomes visible, and the place is free again."""
        store = make_store(10)
        artifact = make_artifact("a", 10)

        def receive(*pieces: bytes) -> None:
            writer = store.receive(make_model("m"), artifact_digest(artifact), 10)
            try:
                for piece in pieces:
                    writer.write(piece)
                writer.commit()
            finally:
                writer.abort()

        with pytest.raises(TruncatedError):
            receive(artifact[:-1])
        with pytest.raises(TruncatedError):
            receive()
        with pytest.raises(TruncatedError):
            receive(artifact, b"x")
        with pytest.raises(ChecksumError):
            receive(artifact[:-1] + bytes([artifact[-1] ^ 1]))
        with pytest.raises(FormatError):
            receive(artifact, b"")
        assert store.stat() == ArtifactStat(0, 0, 10)
        receive(artifact)
        assert read_all(store, make_model("m")) == artifact

    def test_a_reader_is_not_disturbed(self, make_store: ArtifactStoreFactory) -> None:
        """By a delete, by a put of the same, or by a close that comes twice."""
        store = make_store(300_000)
        artifact = make_artifact("a", 100_003)
        digest = store.put(make_model("m"), artifact)
        reader = store.open(make_model("m"))
        assert reader is not None
        pieces = [reader.read(1000)]
        store.put(make_model("m"), artifact)
        pieces.append(reader.read(1000))
        store.delete(make_model("m"), digest)
        pieces += iter(lambda: reader.read(10_000), b"")
        assert b"".join(pieces) == artifact
        assert reader.read(1) == b""
        reader.close()
        reader.close()
        assert reader.read(1) == b""

    @settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
    @given(operations=_operations)
    def test_any_calls(self, make_store: ArtifactStoreFactory, operations: list[tuple[str, bytes, bytes]]) -> None:
        """After any sequence of calls the store holds what the model holds, and never more than its capacity."""
        # The fixture is shared by all examples; each makes a store of its own.
        store = make_store(_MODEL_CAPACITY_BYTES)
        model = ArtifactModel(_MODEL_CAPACITY_BYTES)
        for verb, of_model, artifact in operations:
            digest = artifact_digest(artifact)
            if verb == "delete":
                assert store.delete(of_model, digest) == model.delete(of_model, artifact)
            elif verb == "break off":
                self._break_off(store, of_model, artifact)
            elif model.put(of_model, artifact):
                assert store.put(of_model, artifact) == digest
            else:
                with pytest.raises(CapacityError):
                    store.put(of_model, artifact)
            assert entries_of(store) == model.entries()
            sizes = [len(each) for each in model.artifacts]
            assert store.stat() == ArtifactStat(len(sizes), sum(sizes), _MODEL_CAPACITY_BYTES)
        for of_model, artifacts in model.models.items():
            assert read_all(store, of_model) == (artifacts[-1] if artifacts else None)
            for artifact in artifacts:
                assert read_all(store, of_model, artifact_digest(artifact)) == artifact

    def _break_off(self, store: ArtifactStore, model_digest: bytes, artifact: bytes) -> None:
        try:
            writer = store.receive(model_digest, artifact_digest(artifact), len(artifact))
        except CapacityError:
            return
        if len(artifact) > 1:
            writer.write(artifact[:-1])
        writer.abort()

    def test_many_at_once(self, make_store: ArtifactStoreFactory) -> None:
        """Readers get an artifact whole or not at all, and the counts agree in the end."""
        artifacts = [make_artifact(i, 20_011 + i) for i in range(6)]
        capacity_bytes = sum(map(len, artifacts[:4]))
        store = make_store(capacity_bytes)
        model = make_model("m")
        failures: list[BaseException] = []

        def work(thread: int) -> None:
            try:
                for i in range(24):
                    artifact = artifacts[(7 * i + thread) % len(artifacts)]
                    digest = artifact_digest(artifact)
                    try:
                        store.put(model, artifact)
                    except CapacityError:
                        store.delete(model, artifact_digest(artifacts[(i + thread) % len(artifacts)]))
                    assert read_all(store, model, digest) in (None, artifact)
                    assert read_all(store, model) in (None, *artifacts)
                    assert store.stat().stored_bytes <= capacity_bytes
            except BaseException as error:  # reported below, in the test's own thread
                failures.append(error)

        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
            assert not thread.is_alive(), "a thread hangs"
        assert not failures, failures
        entries = store.entries()
        assert store.stat() == ArtifactStat(len(entries), sum(e.size_bytes for e in entries), capacity_bytes)
        assert [e.is_current for e in entries] == [False] * (len(entries) - 1) + [True]
        for entry in entries:
            assert read_all(store, model, entry.digest) in artifacts

    def test_tenants_have_stores_of_their_own(self, make_store: ArtifactStoreFactory) -> None:
        """The same model and artifact in all of them, and room that nobody else takes."""
        store = make_store(1000)
        model, artifact = make_model("m"), make_artifact("a", 700)
        digest = store.put(model, artifact)
        one, other = store.of_tenant("one"), store.of_tenant("other-1")
        try:
            assert one.entries() == other.entries() == []
            assert one.stat() == ArtifactStat(0, 0, 1000)
            assert one.put(model, artifact) == digest
            assert store.delete(model, digest)
            assert read_all(one, model) == artifact
            assert read_all(other, model) is None
        finally:
            one.close()
            other.close()
        assert store.entries() == []

    def test_closed(self, make_store: ArtifactStoreFactory) -> None:
        """Closing twice is fine; using it afterwards is refused, and what is on its way in can only be given up."""
        store = make_store(1000)
        artifact = make_artifact("a", 10)
        writer = store.receive(make_model("m"), artifact_digest(artifact), 10)
        writer.write(artifact)
        store.close()
        store.close()
        with pytest.raises(StorageUnavailableError):
            writer.commit()
        writer.abort()
        for use in (
            lambda: store.put(make_model("m"), artifact),
            lambda: store.open(make_model("m")),
            lambda: store.current(make_model("m")),
            lambda: store.delete(make_model("m"), bytes(32)),
            store.entries,
            store.stat,
        ):
            with pytest.raises(StorageUnavailableError):
                use()
