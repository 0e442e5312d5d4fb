"""What waits for its pages is not seen by SGLang's search, and keeps its place in the queue."""

import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kvcodec.plugin.held_back import ALL_EVERY, HeldBack
from sglang_kvcodec.plugin.scheduler_time import SchedulerTime


class Req:
    """Equal to no other."""

    def __init__(self, rid):
        self.rid = rid

    def __repr__(self):
        return self.rid


def search(queue, waits, change=lambda queue: queue):
    """One pass; the queue that SGLang saw, and the queue afterwards."""
    scheduler = types.SimpleNamespace(waiting_queue=list(queue))
    seen = []

    def look():
        seen.extend(scheduler.waiting_queue)
        scheduler.waiting_queue = change(list(scheduler.waiting_queue))
        return "a batch"

    rids = {req.rid for req in waits}
    assert HeldBack(lambda req: None, SchedulerTime()).around(scheduler, rids, look) == "a batch"
    return seen, scheduler.waiting_queue


A, B, C, D, E = (Req(name) for name in "abcde")


def test_those_that_wait_keep_their_places():
    assert search([A, B, C, D], {B, D}) == ([A, C], [A, B, C, D])
    # One was taken, one came.
    assert search([A, B, C, D], {B, D}, lambda queue: [*queue[1:], E]) == ([A, C], [B, C, D, E])
    assert search([A, B], {A, B}) == ([], [A, B])
    assert search([A, B], set()) == ([A, B], [A, B])


def test_in_a_queue_that_was_sorted_they_are_behind():
    assert search([A, B, C], {A}, lambda queue: queue[::-1]) == ([B, C], [C, B, A])
    assert search([A, B, C], {A}, lambda queue: [E, *queue]) == ([B, C], [E, B, C, A])


def test_a_search_that_fails_loses_nobody():
    def fail(queue):
        raise MemoryError

    scheduler = types.SimpleNamespace(waiting_queue=[A, B])
    with pytest.raises(MemoryError):
        HeldBack(lambda req: None, SchedulerTime()).around(scheduler, {"a"}, lambda: fail(scheduler.waiting_queue))
    assert scheduler.waiting_queue == [A, B]


def test_now_and_then_all_are_seen():
    touched = []
    scheduler, book, seen = types.SimpleNamespace(waiting_queue=[A, B]), HeldBack(touched.append, SchedulerTime()), []
    for _ in range(3 * ALL_EVERY):
        book.around(scheduler, {"a"}, lambda: seen.append(len(scheduler.waiting_queue)))
    assert seen.count(2) == 3
    # Those that wait are the last to be evicted on the device.
    assert touched == [A] * 3
    assert scheduler.waiting_queue == [A, B]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=8), st.integers(0, 3))
def test_nobody_is_lost_or_there_twice_and_places_hold(kinds, come):
    queue = [Req(str(index)) for index in range(len(kinds))]
    waits = {req for req, (is_held, _) in zip(queue, kinds, strict=True) if is_held}
    taken = {req for req, (is_held, is_taken) in zip(queue, kinds, strict=True) if is_taken and not is_held}
    new = [Req(f"new {index}") for index in range(come)]
    seen, after = search(queue, waits, lambda queue: [*(req for req in queue if req not in taken), *new])
    assert seen == [req for req in queue if req not in waits]
    assert after == [*(req for req in queue if req not in taken), *new]
