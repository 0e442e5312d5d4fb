"""What a Fetch plans, reads and never holds."""

import contextlib

import pytest

from sglang_kvcodec.format.page_object import read_header
from sglang_kvcodec.rpc.fetching import (
    AT_HAND_S,
    FetchMessage,
    PageLayout,
    PayloadReader,
    Slice,
    plan_messages,
    read_page,
)
from sglang_kvcodec.rpc.wire import decode_fetch
from sglang_kvcodec.storage.lmdb_engine import LmdbEngine
from sglang_kvcodec.storage.wrappers import FaultyEngine


def test_messages_are_group_major_and_full():
    layouts = {2: PageLayout(40, ((10, 20), (20, 40))), 5: PageLayout(33, ((8, 8), (8, 33)))}
    assert list(plan_messages(layouts, 16)) == [
        [Slice(2, 10, 20), Slice(2, 20, 26)],
        [Slice(2, 26, 40), Slice(5, 8, 10)],
        [Slice(5, 10, 26)],
        [Slice(5, 26, 33)],
    ]


def test_nothing_to_send():
    assert list(plan_messages({}, 16)) == []
    assert list(plan_messages({0: PageLayout(8, ((8, 8),))}, 16)) == []


def test_a_header_longer_than_the_first_read(engine, namespace, page, monkeypatch):
    monkeypatch.setattr("sglang_kvcodec.rpc.fetching._FIRST_READ_BYTES", 64)
    page_hash, data = page("a")
    engine.put(namespace + page_hash, data)
    header, layout = read_page(engine, namespace + page_hash, len(data))
    assert header == data[: read_header(data).header_bytes]
    assert layout == PageLayout(len(data), read_header(data).group_ranges)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data, other: b"",
        lambda data, other: data[:11],
        lambda data, other: data[:100],
        lambda data, other: data[:-1],
        lambda data, other: data + b"x",
        lambda data, other: data[:60] + bytes([data[60] ^ 4]) + data[61:],
        lambda data, other: data[:4] + b"\x63" + data[5:],
        lambda data, other: other,
        lambda data, other: bytes(len(data)),
    ],
    ids=["empty", "no prefix", "no manifest", "short", "long", "bit flip", "version", "another page", "zeros"],
)
def test_what_cannot_be_read_is_deleted(engine, namespace, page, damage, caplog):
    page_hash, data = page("a")
    key = namespace + page_hash
    stored = damage(data, page("b")[1])
    engine.put(key, stored)
    assert read_page(engine, key, len(stored)) is None
    assert engine.get(key) is None
    assert "can't be read" in caplog.text


def test_a_page_of_another_namespace_is_deleted_where_it_can_not_be_a_tenants(engine, namespace, page):
    page_hash, data = page("a")
    key = bytes(32) + page_hash
    engine.put(key, data)
    assert read_page(engine, key, len(data), has_tenants=True) is None
    assert engine.get(key) == data
    assert read_page(engine, key, len(data)) is None
    assert engine.get(key) is None
    # Another page is none of a tenant's.
    engine.put(key, page("b")[1])
    assert read_page(engine, key, len(page("b")[1]), has_tenants=True) is None
    assert engine.get(key) is None


def test_an_object_that_went_or_changed_is_lost(engine, namespace, page):
    keys = [namespace + page(name)[0] for name in "abc"]
    engine.put(keys[0], b"0123456789")
    engine.put(keys[2], b"0123")
    plans = [
        [Slice(0, 2, 5), Slice(1, 0, 4), Slice(2, 2, 6), Slice(2, 0, 1), Slice(0, 5, 6)],
        [Slice(1, 4, 5)],
        [Slice(0, 6, 10)],
    ]
    first, second, third = PayloadReader(engine, keys).read(plans)
    assert (first.lost, first.payload_bytes) == ((1, 2), 4)
    assert [(f.page_index, f.offset, f.data) for f in decode_fetch(first.encoded)] == [(0, 2, b"234"), (0, 5, b"5")]
    assert (second.lost, second.payload_bytes) == ((), 0)
    assert third.payload_bytes == 4


def test_read_page_of_nothing(engine):
    assert read_page(engine, bytes(64), 10) is None


def test_what_was_read_a_moment_ago_is_read_by_the_event_loop_itself(tmp_path, namespace, page):
    now_s = 100.0
    keys, pages = [], []
    with contextlib.closing(LmdbEngine(tmp_path / "store", 1 << 20)) as store:
        for name in "ab":
            page_hash, data = page(name)
            keys.append(namespace + page_hash)
            pages.append(data)
            store.put(keys[-1], data)
        reader = PayloadReader(store, keys, clock_s=lambda: now_s)
        both, one = [Slice(0, 5, 9), Slice(1, 7, 8)], [Slice(1, 8, 9)]
        assert reader.read_now(both) is None
        reader.was_read([0])
        assert reader.read_now(both) is None
        (read,) = reader.read([both])
        assert reader.read_now(both) == read
        assert [bytes(event.data) for event in decode_fetch(read.encoded)] == [pages[0][5:9], pages[1][7:8]]
        now_s += AT_HAND_S / 2
        reader.read([one])
        now_s += AT_HAND_S / 2
        assert reader.read_now(both) is None
        assert reader.read_now(one) == reader.read([one])[0]
        store.delete(keys[1])
        assert reader.read_now(one).lost == (1,)
        assert reader.read_now(one) == FetchMessage(b"", 0, ())


def test_an_engine_whose_reads_may_wait_is_read_in_threads(engine, namespace, page):
    page_hash, data = page("a")
    engine.put(namespace + page_hash, data)
    wrapped = FaultyEngine(engine)
    reader = PayloadReader(wrapped, [namespace + page_hash])
    assert reader.read([[Slice(0, 0, 9)]])[0].payload_bytes == 9
    assert reader.read_now([Slice(0, 0, 9)]) is None
