"""With a simulated clock: what is measured, how fast it follows a change, and what it makes of outliers."""

import pytest
from flow_kit import Clock, about

from sglang_kvcodec.flow.link_meter import LinkMeter


class Link:
    """A link that carries messages of one size, and a meter that listens."""

    def __init__(self, message_bytes=10_000):
        self.clock = Clock()
        self.meter = LinkMeter(self.clock)
        self.message_bytes = message_bytes
        self.transfer = None

    def begin(self):
        self.transfer = self.meter.transfer()
        self.clock.now_s += 0.001
        self.transfer.received(500)

    def carry(self, bytes_per_s, seconds):
        for _ in range(max(1, round(seconds * bytes_per_s / self.message_bytes))):
            self.clock.now_s += self.message_bytes / bytes_per_s
            self.transfer.received(self.message_bytes)


def test_nothing_is_known_before_anything_arrives():
    link = Link()
    assert link.meter.bytes_per_s() is None
    assert link.meter.age_s == float("inf")
    assert link.meter.round_trip_s == 0
    transfer = link.meter.transfer()
    link.clock.now_s += 3
    assert link.meter.bytes_per_s() is None
    transfer.end()
    assert link.meter.bytes_per_s() is None


@pytest.mark.parametrize("bytes_per_s", [1.25e5, 1.25e6, 1.25e9])
def test_a_steady_link(bytes_per_s):
    link = Link(max(10_000, int(bytes_per_s / 1000)))
    link.begin()
    link.carry(bytes_per_s, 1.0)
    assert link.meter.bytes_per_s() == about(bytes_per_s)
    link.transfer.end()
    link.transfer.end()
    assert link.meter.bytes_per_s() == about(bytes_per_s)
    link.clock.now_s += 7
    assert link.meter.age_s == about(7)


@pytest.mark.parametrize(("before", "after"), [(1e8, 1e7), (1e7, 1e8), (1e8, 1e5), (1e5, 1e8)])
def test_a_change_is_followed_within_a_second(before, after):
    link = Link(5_000)
    link.begin()
    link.carry(before, 3)
    link.carry(after, 0.9)
    assert link.meter.bytes_per_s() == about(after)


def test_short_transfers_over_a_fast_link_are_measured_at_their_end():
    link = Link(100_000)
    for _ in range(5):
        link.begin()
        link.carry(1e9, 0.001)
        link.transfer.end()
        link.clock.now_s += 0.3
    assert link.meter.bytes_per_s() == about(1e9)


def test_a_burst_at_the_end_of_a_transfer_is_no_rate():
    link = Link()
    for _ in range(4):
        link.begin()
        link.carry(1e7, 0.06)
        link.carry(1e9, 0.0001)
        link.transfer.end()
    assert link.meter.bytes_per_s() == about(1e7)


def test_after_a_pause_only_what_is_new_counts():
    link = Link()
    link.begin()
    link.carry(1e5, 5)
    link.transfer.end()
    link.clock.now_s += 2
    link.begin()
    link.carry(1e7, 0.05)
    link.transfer.end()
    assert link.meter.bytes_per_s() == about(1e7)


def test_by_how_much_a_link_falls_short_at_times():
    link = Link()
    assert link.meter.shortfall is None
    link.begin()
    link.carry(10e6, 0.1)
    # Too few slices.
    assert link.meter.shortfall is None
    link.carry(10e6, 0.5)
    assert link.meter.shortfall == pytest.approx(0, abs=0.05)
    link.carry(7e6, 0.06)
    link.carry(10e6, 0.1)
    assert link.meter.shortfall == pytest.approx(0.3, abs=0.08)
    link.carry(10e6, 1.0)
    assert link.meter.shortfall == pytest.approx(0, abs=0.05)


def test_outliers_are_forgotten():
    link = Link(5_000)
    link.begin()
    link.carry(1e6, 2)
    link.carry(1e9, 0.00001)
    link.clock.now_s += 0.15
    link.transfer.received(5_000)
    link.carry(1e6, 0.1)
    assert link.meter.bytes_per_s() == about(1e6)


def test_silence_counts_while_something_is_on_its_way_and_only_then():
    link = Link()
    link.begin()
    link.carry(1e7, 1)
    link.clock.now_s += 0.09
    assert link.meter.bytes_per_s() == about(1e7)
    link.clock.now_s += 0.9
    assert link.meter.bytes_per_s() < 1e5
    link.transfer.end()
    assert link.meter.bytes_per_s() == about(1e7)


def test_a_link_that_was_given_up_in_silence_counts_as_slow():
    link = Link()
    link.begin()
    link.transfer.received(10_000)
    link.clock.now_s += 0.5
    link.transfer.end()
    assert link.meter.bytes_per_s() == about(10_000 / 0.5)


def test_transfers_at_once_share_what_is_measured():
    link = Link()
    link.begin()
    other = link.meter.transfer()
    for _ in range(100):
        link.clock.now_s += 0.01
        link.transfer.received(10_000)
        other.received(30_000)
    assert link.meter.bytes_per_s() == about(4e6)
    other.end()
    link.carry(1e6, 1)
    assert link.meter.bytes_per_s() == about(1e6)


def test_on_a_slow_link_the_first_message_tells():
    link = Link()
    link.meter.round_trip(0.002)
    transfer = link.meter.transfer()
    link.clock.now_s += 1.602
    transfer.received(16_000)
    assert link.meter.bytes_per_s() == about(1e4)


def test_round_trips_are_a_median():
    meter = LinkMeter()
    for seconds in [0.01, 0.01, 3.0, 0.01, 0.012]:
        meter.round_trip(seconds)
    assert meter.round_trip_s == 0.01
