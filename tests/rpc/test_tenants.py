"""Tenants in one engine: each has all that an engine promises, and nothing of the others."""

import contextlib
import hashlib

import pytest

from sglang_kvcodec.config import Access
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import SideData, build_page_object, read_header
from sglang_kvcodec.format.spec import KVDtype, KVSpec, layer_groups
from sglang_kvcodec.rpc import tenants
from sglang_kvcodec.rpc.server import PeerSecurity
from sglang_kvcodec.rpc.tenants import TenantEngine
from sglang_kvcodec.rpc.tokens import TokenEntry, TokenFile, append_entry
from sglang_kvcodec.storage.lmdb_engine import LmdbEngine
from sglang_kvcodec.storage.memory import MemoryEngine
from sglang_kvcodec.storage.wrappers import ExpiringEngine, MeteredEngine
from sglang_kvcodec.testing.storage import StorageEngineContract, make_key

SECRET = bytes(range(32))
SPEC = KVSpec(layers=1, kv_heads=1, head_dim=64, page_tokens=16, dtype=KVDtype.BFLOAT16)


class ListedEngine(TenantEngine):
    """Lists keys as the tenant calls them without asking the objects, which are none of pages here."""

    def __init__(self, engine, tenant, secret):
        super().__init__(engine, tenant, secret)
        self._names = {}

    def stored_key(self, key):
        stored = super().stored_key(key)
        self._names[stored] = key
        return stored

    def key_batches(self):
        for batch in self._engine.key_batches():
            yield [self._names[key] for key in batch]


class TestTenantEngine(StorageEngineContract):
    @pytest.fixture
    def make_engine(self):
        return lambda capacity_bytes: ListedEngine(MemoryEngine(capacity_bytes), "t", SECRET)


def test_keys_depend_on_tenant_and_secret_and_keep_the_page_hash():
    key = make_key("page")
    engine = MemoryEngine(1 << 20)
    views = [TenantEngine(engine, *each) for each in (("a", SECRET), ("b", SECRET), ("a", bytes(32)), ("aa", SECRET))]
    stored = [view.stored_key(key) for view in views]
    assert len({key, *stored}) == 5
    assert {len(each) for each in stored} == {64}
    assert {each[32:] for each in stored} == {key[32:]}
    assert TenantEngine(engine, "a", SECRET).stored_key(key) == stored[0]
    # Of the same namespace the same, of another one another.
    assert views[0].stored_key(key[:32] + bytes(32))[:32] == stored[0][:32]
    assert views[0].stored_key(bytes(32) + key[32:])[:32] != stored[0][:32]


def test_a_tenant_finds_nothing_of_another_by_any_call():
    engine = ExpiringEngine(MemoryEngine(1 << 20), 1000)
    one, other = (TenantEngine(engine, name, SECRET) for name in ("one", "other"))
    key = make_key("page")
    assert one.put(key, b"value")
    for stranger in (other, engine):
        assert stranger.sizes([key]) == stranger.stored_at_s([key]) == stranger.peek([key]) == [None]
        assert stranger.get(key) is stranger.get_range(key, 0, 5) is None
        with stranger.ranges() as get_range, stranger.reading_ahead([(key, 5)]):
            assert get_range(key, 0, 5) is None
        assert not stranger.delete(key)
        assert stranger.put(key, b"other")
    assert one.get(key) == b"value"
    with one.ranges() as get_range, one.reading_ahead([(key, 5)]):
        assert bytes(get_range(key, 1, 3)) == b"al"
    assert one.stored_at_s([key]) != [None]
    assert one.peek([key])[0].size_bytes == len(b"value")
    assert engine.stat().objects == 3


def test_a_tenant_finds_nothing_of_another_by_a_read_that_must_not_wait(tmp_path):
    with contextlib.closing(LmdbEngine(tmp_path / "store", 1 << 20)) as lmdb:
        engine = MeteredEngine(ExpiringEngine(lmdb, 1000))
        one, other = (TenantEngine(engine, name, SECRET) for name in ("one", "other"))
        key = make_key("page")
        assert one.put(key, b"value")
        with one.ranges_now() as get_range:
            assert bytes(get_range(key, 1, 3)) == b"al"
        for stranger in (other, engine):
            with stranger.ranges_now() as get_range:
                assert get_range(key, 0, 5) is None
    with TenantEngine(MemoryEngine(100), "one", SECRET).ranges_now() as get_range:
        assert get_range is None


def test_a_tenant_lists_its_own_pages_by_its_own_names(page):
    """Whatever else is there: the same pages of others, what is damaged, and namespaces with a damaged object."""
    engine = ExpiringEngine(MemoryEngine(1 << 30), 1000)
    one, other = (TenantEngine(engine, name, SECRET) for name in ("one", "other"))
    pages = [page(f"listed {index}") for index in range(7)]
    namespaces = {read_header(data).key.namespace_digest for _, data in pages}
    assert len(namespaces) == 1
    keys = [read_header(data).key.to_bytes() for _, data in pages]
    damaged = keys[0][:32] + bytes(32)
    for key, (_, data) in zip(keys, pages, strict=True):
        for store in (one, other, engine) if key != keys[0] else (one,):
            store.put(key, data)
    one.put(damaged, b"no page object")
    # Nothing in it can be read: nobody knows what it is called.
    one.put(make_key("elsewhere"), b"KVPO")
    listed = [key for batch in one.key_batches() for key in batch]
    assert sorted(set(listed) - {damaged}) == sorted(keys)
    assert len(listed) == len(set(listed))
    assert sorted(key for batch in one.key_batches() for key in batch) == sorted([*keys, damaged])
    assert sorted(key for batch in other.key_batches() for key in batch) == sorted(keys[1:])
    # All that is stored, under the names in the store.
    assert sum(len(batch) for batch in engine.key_batches()) == 7 + 6 + 6 + 2
    assert list(TenantEngine(engine, "third", SECRET).key_batches()) == [[]]


def test_namespaces_beyond_those_that_are_remembered(monkeypatch):
    monkeypatch.setattr(tenants, "_NAMESPACES_REMEMBERED", 2)
    engine = MemoryEngine(1 << 30)
    one = TenantEngine(engine, "one", SECRET)
    keys = [PageKey(bytes([number]) * 32, bytes(32)) for number in range(5)]
    groups = [{side: SideData(stored=b"x") for side in SPEC.sides} for _ in layer_groups(SPEC)]
    for key in keys:
        one.put(key.to_bytes(), build_page_object(key, SPEC, "raw", groups))
    for _ in range(2):
        assert sorted(key for batch in one.key_batches() for key in batch) == [key.to_bytes() for key in keys]


def test_a_page_of_another_tenant_takes_the_path_of_one_that_is_nowhere(
    tmp_path, start_peer, connect, engine, namespace, page
):
    """What a peer does, and so how long it takes, tells nobody what others have stored or asked for."""
    for name in ("one", "other"):
        digest = hashlib.sha256(name.encode()).digest()
        append_entry(tmp_path / "tokens", TokenEntry(name, digest, frozenset({"read", "write"}), tenant=name))
        (tmp_path / name).write_text(name)
    peer = start_peer(security=PeerSecurity(tokens=TokenFile(tmp_path / "tokens")))
    one, other = (connect(peer.remote, access=Access(token_file=str(tmp_path / name))) for name in ("one", "other"))
    theirs = [page(f"theirs {index}") for index in range(5)]
    hashes = [page_hash for page_hash, _ in theirs]
    one.lookup(namespace, hashes)
    one.put(namespace, theirs)
    calls = []
    engine.before = lambda method, keys: calls.append((method, len(keys)))

    def seen(objects):
        calls.clear()
        hashes = [page_hash for page_hash, _ in objects]
        # The last page alone: the peer knows from nobody but its own tenant what comes before it.
        answers = [other.put(namespace, objects[-1:]), other.lookup(namespace, hashes[:-1])]
        answers += [list(other.fetch(namespace, hashes[:-1])), other.delete(namespace, hashes[:-1])]
        return answers, list(calls)

    assert seen(theirs) == seen([page(f"nobody's {index}") for index in range(5)])
    assert one.lookup(namespace, hashes).covered_pages == 5
