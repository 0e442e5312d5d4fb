from flow_kit import counted

from sglang_kvcodec.flow.fetch_queue import FetchQueue, turn_s


def test_the_shortest_that_waits_is_next_but_none_for_ever():
    assert turn_s(100.0, 10e6, 1e6) == 110.0
    assert turn_s(109.0, 0.5e6, 1e6) < turn_s(100.0, 10e6, 1e6) < turn_s(110.0, 0.5e6, 1e6)
    assert turn_s(100.0, 10e6, None) < turn_s(100.1, 0.0, None)
    assert turn_s(100.0, 10e6, 0.0) > 1e6


def test_what_waits_for_a_thread_is_counted():
    queue = FetchQueue()
    for number in range(3):
        queue.put(-number, number)
    assert counted("kvcodec_queued_fetches") == len(queue) == 3
    assert [queue.take() for _ in range(3)] == [2, 1, 0]
    assert counted("kvcodec_queued_fetches") == len(queue) == 0
