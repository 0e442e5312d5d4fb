"""The index of sizes says what a dictionary would, while it collects and between its arrays."""

import os
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kvcodec.storage import size_index
from sglang_kvcodec.storage.size_index import SizeIndex

LIMIT_S = 30


def key(number):
    return number.to_bytes(8, "big") * 8


def wait_for(condition):
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def batches(objects, size=3):
    items = sorted(objects.items())
    for start in range(0, len(items), size):
        some = items[start : start + size]
        yield [each for each, _ in some], [each for _, each in some]


@pytest.fixture
def made():
    made = []

    def make(walk):
        made.append(SizeIndex(walk))
        return made[-1]

    yield make
    for index in made:
        index.close()


def test_an_empty_store(made):
    index = made(lambda: iter(()))
    wait_for(lambda: index.is_ready)
    assert index.sizes([key(1), key(2)]) == [None, None]
    assert index.sizes([]) == []
    index.change({key(1): 5})
    assert index.sizes([key(1), key(2)]) == [5, None]


def test_it_says_nothing_before_it_knows_all_and_changes_meanwhile_count(made):
    go_on = threading.Event()

    def walk():
        yield [key(1), key(2)], [10, 20]
        go_on.wait(LIMIT_S)
        # Read before it was removed.
        yield [key(3), key(4)], [30, 40]

    index = made(walk)
    assert index.sizes([key(1)]) is None
    index.change({key(3): None, key(5): 50, key(1): None})
    index.change({key(1): 11})
    go_on.set()
    wait_for(lambda: index.is_ready)
    assert index.sizes([key(n) for n in range(1, 7)]) == [11, 20, None, 40, 50, None]


@pytest.mark.parametrize("objects", [1, 15, 16, 17, 1000, 50_000])
def test_those_that_are_there_are_found_and_no_others(made, objects):
    keys = [os.urandom(64) for _ in range(objects)]
    index = made(lambda: iter([(keys, list(range(objects)))]))
    wait_for(lambda: index.is_ready)
    assert index.sizes(keys) == list(range(objects))
    assert index.sizes([os.urandom(64) for _ in range(1000)]) == [None] * 1000


def test_objects_of_any_size(made):
    index = made(lambda: iter([([key(1), key(2)], [0, 1 << 40])]))
    wait_for(lambda: index.is_ready)
    index.change({key(3): 1 << 41})
    assert index.sizes([key(1), key(2), key(3)]) == [0, 1 << 40, 1 << 41]


def test_keys_that_differ_in_top_bits_alone_have_other_fingerprints(made):
    # With factors that are odd, flips of the highest bits of two words would cancel out.
    plain = bytearray(64)
    keys = []
    for first in range(0, 64, 8):
        for second in range(first + 8, 64, 8):
            flipped = plain.copy()
            flipped[first + 7] ^= 0x80
            flipped[second + 7] ^= 0x80
            keys.append(bytes(flipped))
    index = made(lambda: iter([([bytes(plain)], [7])]))
    wait_for(lambda: index.is_ready)
    assert index.sizes(keys) == [None] * len(keys)


def test_a_walk_that_fails_leaves_it_silent(made, caplog):
    def walk():
        yield [key(1)], [1]
        raise OSError("disk")

    index = made(walk)
    wait_for(lambda: "the index of the store ended" in caplog.text)
    index.change({key(2): 2})
    assert index.sizes([key(1)]) is None


def test_it_can_be_closed_while_it_collects(made):
    begun = threading.Event()

    def walk():
        for number in range(10**9):
            begun.set()
            yield [key(number)], [1]

    index = made(walk)
    assert begun.wait(LIMIT_S)
    index.close()
    assert not index.is_ready


@settings(max_examples=25)
@given(
    st.dictionaries(st.integers(0, 30), st.integers(0, 9), max_size=20),
    st.lists(
        st.dictionaries(st.integers(0, 30), st.none() | st.integers(0, 9), min_size=1, max_size=8),
        max_size=12,
    ),
)
def test_it_says_what_a_dictionary_would(objects, changes):
    truth = {key(number): size for number, size in objects.items()}
    index = SizeIndex(lambda: batches(truth.copy()))
    try:
        size_index.LEAST_CHANGES = 5
        wait_for(lambda: index.is_ready)
        asked = [key(number) for number in (*range(32), 3, 3)]
        for some in changes:
            changed = {key(number): size for number, size in some.items()}
            index.change(changed)
            truth.update(changed)
            # Right at once, whether another array is being made or not.
            assert index.sizes(asked) == [truth.get(each) for each in asked]
        wait_for(lambda: len(index._state.changes) < 5 and not index._state.older_changes)
        assert index.sizes(asked) == [truth.get(each) for each in asked]
    finally:
        size_index.LEAST_CHANGES = 1 << 14
        index.close()


def test_readers_see_whole_states_while_arrays_are_made(made, monkeypatch):
    monkeypatch.setattr(size_index, "LEAST_CHANGES", 64)
    keys = [os.urandom(64) for _ in range(512)]
    index = made(lambda: iter([(keys, [1] * len(keys))]))
    wait_for(lambda: index.is_ready)
    over = threading.Event()
    wrong = []

    def read():
        while not over.is_set():
            wrong.extend(size for size in index.sizes(keys) if size is None)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(2000):
        # There before and after: a reader never misses it.
        index.change({keys[number % len(keys)]: 1 + number})
    over.set()
    for reader in readers:
        reader.join()
    assert not wrong
