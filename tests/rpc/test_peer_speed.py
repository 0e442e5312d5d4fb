"""Who of several peers is asked for what."""

import pytest

from sglang_kvcodec.rpc.peer_speed import PeerSpeed, share_out

PAGE_BYTES = 200_000


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


def speed(latency_s=0.001, bytes_per_s=None, clock=None):
    made = PeerSpeed(clock or Clock())
    made.answered_in(latency_s)
    if bytes_per_s is not None:
        made.delivered(int(bytes_per_s), 1.0)
    return made


def first(orders, peers):
    counts = [0] * peers
    for order in orders:
        counts[order[0]] += 1
    return counts


def test_peers_that_are_alike_get_the_same_share():
    orders = share_out([[0, 1], [1, 0]] * 20, [speed(), speed()], PAGE_BYTES)
    assert first(orders, 2) == [20, 20]
    assert all(sorted(order) == [0, 1] for order in orders)


def test_a_slow_peer_gets_less_so_that_both_end_together():
    speeds = [speed(bytes_per_s=90e6), speed(bytes_per_s=10e6)]
    assert first(share_out([[0, 1], [1, 0]] * 50, speeds, PAGE_BYTES), 2) == pytest.approx([90, 10], abs=1)


def test_a_far_peer_gets_what_the_near_one_would_need_longer_for():
    speeds = [speed(0.001, 100e6), speed(0.101, 100e6)]
    # In a tenth of a second the near one delivers fifty pages.
    assert first(share_out([[1, 0]] * 40, speeds, PAGE_BYTES), 2) == [40, 0]
    assert first(share_out([[1, 0]] * 150, speeds, PAGE_BYTES), 2) == pytest.approx([100, 50], abs=1)


def test_what_only_one_has_counts_as_its_load():
    orders = share_out([[0]] * 10 + [[0, 1]] * 10, [speed(), speed()], PAGE_BYTES)
    assert first(orders, 2) == [10, 10]


def test_a_page_that_nobody_has():
    assert share_out([[], [0]], [speed()], PAGE_BYTES) == [[], [0]]


def test_one_of_which_nothing_is_known_is_tried():
    speeds = [speed(bytes_per_s=10e6), speed(), speed(bytes_per_s=1e6)]
    counts = first(share_out([[0, 1, 2]] * 60, speeds, PAGE_BYTES), 3)
    assert counts[0] == pytest.approx(counts[1], abs=1)
    assert counts[2] < counts[0] / 5


def test_the_last_deliveries_count_most():
    peer = speed(bytes_per_s=100e6)
    for _ in range(20):
        peer.delivered(1_000_000, 1.0)
    assert peer.bytes_per_s == pytest.approx(1e6, rel=0.1)


def test_what_lay_in_buffers_tells_nothing():
    peer = speed()
    peer.delivered(1000, 1e-6)
    assert peer.bytes_per_s == 0


def test_a_peer_that_was_slow_long_ago_is_trusted_with_more_again():
    clock = Clock()
    fast, slow = speed(bytes_per_s=64e6, clock=clock), speed(bytes_per_s=1e6, clock=clock)

    def share():
        fast.delivered(64_000_000, 1.0)
        return first(share_out([[0, 1]] * 130, [fast, slow], PAGE_BYTES), 2)[1]

    assert share() == pytest.approx(2, abs=1)
    clock.now_s += 60
    assert share() == pytest.approx(4, abs=1)
    clock.now_s += 60
    assert share() == pytest.approx(8, abs=1)
    clock.now_s += 1e9
    assert share() == 65
    slow.delivered(1_000_000, 1.0)
    assert share() == pytest.approx(2, abs=1)
