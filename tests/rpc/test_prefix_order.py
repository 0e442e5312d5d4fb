"""A page is useless without those before it, so tails are evicted before heads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kvcodec.format.exchange import PutOutcome
from sglang_kvcodec.rpc import prefix_order
from sglang_kvcodec.rpc.prefix_order import PrefixOrder
from sglang_kvcodec.storage.lmdb_engine import LmdbEngine
from sglang_kvcodec.storage.memory import MemoryEngine

PART_BYTES = (1, 3, 17, 1001, 3, 7)


@pytest.fixture
def pages(page):
    return [page(i, PART_BYTES) for i in range(13)]


@pytest.fixture
def others(page):
    return [page(f"other {i}", PART_BYTES) for i in range(13)]


@pytest.fixture
def hashes(pages):
    return [page_hash for page_hash, _ in pages]


@pytest.fixture(params=["memory", "lmdb"])
def engine(request, tmp_path, pages):
    """Has room for 13 pages, whose sizes differ by a few bytes."""
    object_bytes = len(pages[0][1])
    capacity_bytes = 13 * object_bytes + object_bytes // 2
    engine = MemoryEngine(capacity_bytes) if request.param == "memory" else LmdbEngine(tmp_path / "s", capacity_bytes)
    yield engine
    engine.close()


def put(peer, namespace, pages):
    assert {result.outcome for result in peer.put(namespace, pages)} == {PutOutcome.STORED}


def test_of_pages_that_were_only_put_the_last_ones_go_first(peer, namespace, pages, others, hashes):
    put(peer, namespace, pages[:11])
    put(peer, namespace, others[:5])
    assert peer.lookup(namespace, hashes).present == (True,) * 8 + (False,) * 5


def test_pages_that_continue_a_stored_prefix_go_before_it(peer, namespace, pages, others, hashes):
    """As in a conversation: its head is looked up and fetched, then its tail is put."""
    put(peer, namespace, pages[:7])
    put(peer, namespace, others[:2])
    assert peer.lookup(namespace, hashes[:11]).covered_pages == 7
    list(peer.fetch(namespace, hashes[:7]))
    put(peer, namespace, pages[7:9])
    put(peer, namespace, pages[9:11])
    put(peer, namespace, others[2:7])
    assert peer.lookup(namespace, hashes).present == (True,) * 8 + (False,) * 5


def test_a_shared_head_outlives_both_tails(peer, namespace, pages, others, hashes):
    put(peer, namespace, pages[:3])
    for tail in (pages[3:7], pages[7:11]):
        peer.lookup(namespace, hashes[:3] + [page_hash for page_hash, _ in tail])
        put(peer, namespace, tail)
    put(peer, namespace, others[:10])
    assert peer.lookup(namespace, hashes).present == (True,) * 3 + (False,) * 10


def test_pages_that_are_there_already_stay_in_order(peer, namespace, pages, others, hashes):
    put(peer, namespace, pages[:9])
    assert {result.outcome for result in peer.put(namespace, pages[:9])} == {PutOutcome.ALREADY_STORED}
    put(peer, namespace, others[:6])
    assert peer.lookup(namespace, hashes[:9]).covered_pages == 7


def test_what_is_forgotten():
    order = PrefixOrder(pages=6)
    order.learn([b"a", b"b", b"c"])
    order.learn([b"d", b"e"])
    assert order.with_heads([b"c", b"e"]) == [b"a", b"b", b"c", b"d", b"e"]
    order.learn([b"a", b"b"])
    order.learn([b"v", b"w", b"x", b"y"])
    # What was asked for again is there, and what was not has gone with the rest of its time.
    assert order.with_heads([b"c", b"b", b"e", b"y"]) == [b"c", b"a", b"b", b"e", b"v", b"w", b"x", b"y"]


def test_what_is_forgotten_is_freed_bit_by_bit_and_no_longer_known():
    order = PrefixOrder(pages=16)
    chain = [bytes([number]) for number in range(100)]
    held = []
    for first in range(0, 96, 3):
        order.learn(chain[first : first + 4])
        held.append(sum(map(len, (order._newer, order._older, order._forgotten))))
    assert max(held) <= 8 + 3 + 16
    assert order.with_heads([b"\x09"]) == [b"\x09"]
    assert order.with_heads([chain[96]])[-9:] == chain[88:97]


def test_pages_left_out_are_known_from_before():
    order = PrefixOrder()
    order.learn([b"a", b"b", b"c", b"d"])
    order.learn([b"a", b"d", b"e"])
    assert order.with_heads([b"e", b"x"]) == [b"a", b"b", b"c", b"d", b"e", b"x"]


def test_an_endless_prefix_is_cut(monkeypatch):
    monkeypatch.setattr(prefix_order, "_MOST_ANCESTORS", 3)
    order = PrefixOrder()
    order.learn([b"a", b"b", b"c", b"d", b"e"])
    assert order.with_heads([b"e", b"a"]) == [b"c", b"d", b"e", b"a"]


_keys = st.lists(st.integers(0, 9).map(lambda i: bytes([i])), max_size=6)


@given(requests=st.lists(_keys, max_size=6), put=_keys)
def test_any_requests(requests, put):
    """However they contradict each other: every page that was put, none twice, and a known page before comes before."""
    order = PrefixOrder()
    for keys in requests:
        order.learn(keys)
    ordered = order.with_heads(put)
    assert set(put) <= set(ordered)
    assert len(set(ordered)) == len(ordered)


@given(chain=st.lists(st.binary(min_size=1, max_size=2), unique=True, max_size=9), data=st.data())
def test_any_prefix_asked_for_in_parts(chain, data):
    order = PrefixOrder()
    for _ in range(data.draw(st.integers(0, 3))):
        order.learn(chain[data.draw(st.integers(0, len(chain))) :])
    order.learn(chain)
    stop = data.draw(st.integers(0, len(chain)))
    assert order.with_heads(chain[max(0, stop - 1) : stop]) == chain[:stop]
