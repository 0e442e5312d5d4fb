import threading

from flow_kit import LIMIT_S

from sglang_kvcodec.flow.turn_queue import TurnQueue


def filled():
    queue = TurnQueue()
    for turn, item in [(3.0, "a"), (1.0, "b"), (2.0, "c"), (1.0, "d")]:
        queue.put(turn, item)
    return queue


def test_items_come_by_their_turns_and_of_one_turn_the_older_first():
    queue = filled()
    assert [queue.get() for _ in range(4)] == ["b", "d", "c", "a"]


def test_the_oldest_is_dropped_whatever_its_turn():
    queue = filled()
    assert queue.drop_oldest() == "a"
    assert queue.get() == "b"
    assert queue.drop_oldest() == "c"
    assert queue.waiting() == ["d"]
    assert queue.get() == "d"
    assert queue.drop_oldest() is None


def test_it_waits_for_an_item_also_after_one_was_dropped():
    queue = TurnQueue()
    queue.put(1.0, "dropped")
    queue.drop_oldest()
    got = []
    thread = threading.Thread(target=lambda: got.extend([queue.get(), queue.get()]))
    thread.start()
    queue.put(2.0, "next")
    queue.close()
    thread.join(LIMIT_S)
    assert got == ["next", None]


def test_what_is_in_it_can_be_taken_after_it_was_closed():
    queue = filled()
    queue.close()
    assert [queue.get() for _ in range(5)] == ["b", "d", "c", "a", None]
