from sglang_kvcodec.flow.fetch_queue import turn_s


def test_the_shortest_that_waits_is_next_but_none_for_ever():
    assert turn_s(100.0, 10e6, 1e6) == 110.0
    assert turn_s(109.0, 0.5e6, 1e6) < turn_s(100.0, 10e6, 1e6) < turn_s(110.0, 0.5e6, 1e6)
    assert turn_s(100.0, 10e6, None) < turn_s(100.1, 0.0, None)
    assert turn_s(100.0, 10e6, 0.0) > 1e6
