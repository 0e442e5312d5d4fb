"""Tenants in one engine: each has all that an engine promises, and nothing of the others."""

import hashlib

import pytest

from sglang_kvcodec.config import Access
from sglang_kvcodec.rpc.server import PeerSecurity
from sglang_kvcodec.rpc.tenants import TenantEngine
from sglang_kvcodec.rpc.tokens import TokenEntry, TokenFile, append_entry
from sglang_kvcodec.storage.memory import MemoryEngine
from sglang_kvcodec.storage.wrappers import ExpiringEngine
from sglang_kvcodec.testing.storage import StorageEngineContract, make_key

SECRET = bytes(range(32))


class ListedEngine(TenantEngine):
    """Lists keys as the tenant calls them, which a peer has no use for."""

    def __init__(self, engine, tenant, secret):
        super().__init__(engine, tenant, secret)
        self._names = {}

    def stored_key(self, key):
        stored = super().stored_key(key)
        self._names[stored] = key
        return stored

    def key_batches(self):
        for batch in super().key_batches():
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
        assert stranger.sizes([key]) == stranger.stored_at_s([key]) == [None]
        assert stranger.get(key) is stranger.get_range(key, 0, 5) is None
        with stranger.ranges() as get_range, stranger.reading_ahead([(key, 5)]):
            assert get_range(key, 0, 5) is None
        assert not stranger.delete(key)
        assert stranger.put(key, b"other")
    assert one.get(key) == b"value"
    with one.ranges() as get_range, one.reading_ahead([(key, 5)]):
        assert bytes(get_range(key, 1, 3)) == b"al"
    assert one.stored_at_s([key]) != [None]
    assert engine.stat().objects == 3


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
