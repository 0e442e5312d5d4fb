import threading

from sglang_kvcodec.storage.base import StoredObject
from sglang_kvcodec.storage.lru_index import LruIndex


def put(index, key, size_bytes):
    while victims := index.begin_put(key, size_bytes):
        index.deleted(victims)
    if victims is not None:
        index.end_put(key, StoredObject(size_bytes, 0.0))
    return victims is not None


def in_a_thread(call):
    results = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    return thread, results


def test_a_put_waits_for_the_room_that_another_one_holds():
    index = LruIndex(100, [], 0)
    assert index.begin_put(b"a", 60) == []
    thread, results = in_a_thread(lambda: put(index, b"b", 50))
    thread.join(timeout=0.1)
    assert thread.is_alive()
    index.end_put(b"a", None)
    thread.join(timeout=60)
    assert results == [True]
    assert index.stored_bytes == 50


def test_a_put_waits_for_another_one_of_the_same_object():
    index = LruIndex(100, [], 0)
    assert index.begin_put(b"a", 10) == []
    thread, results = in_a_thread(lambda: put(index, b"a", 10))
    thread.join(timeout=0.1)
    assert thread.is_alive()
    index.end_put(b"a", StoredObject(10, 0.0))
    thread.join(timeout=60)
    assert results == [False]


def test_a_put_waits_for_the_deletion_of_its_object_by_another():
    """Or the deletion could come after the put and hit what it has stored."""
    index = LruIndex(100, [(b"a", StoredObject(60, 0.0))], 0)
    assert index.begin_put(b"b", 70) == [b"a"]
    thread, results = in_a_thread(lambda: put(index, b"a", 30))
    thread.join(timeout=0.1)
    assert thread.is_alive()
    index.deleted([b"a"])
    assert index.begin_put(b"b", 70) in ([], [b"a"])
    thread.join(timeout=60)
    assert results == [True]


def test_what_could_not_be_deleted_counts_and_is_tried_again_by_the_next():
    index = LruIndex(100, [(b"a", StoredObject(60, 0.0))], 3)
    assert index.begin_put(b"b", 70) == [b"a"]
    index.deleted([b"a"], have_gone=False)
    assert index.peek([b"a"]) == [None]
    assert index.begin_put(b"c", 40) == []
    index.end_put(b"c", StoredObject(40, 0.0))
    assert index.begin_put(b"d", 10) == [b"a"]
    index.deleted([b"a"])
    assert index.begin_put(b"d", 10) == []
    assert index.evicted_objects == 4
