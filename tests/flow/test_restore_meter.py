import pytest
from flow_kit import Clock, about

from sglang_kvcodec.flow.restore_meter import RESTORE_DOUBTED_S, TIER_FORGOTTEN_S, RestoreMeter


def test_restoring_is_learnt_per_part_and_byte():
    clock = Clock()
    meter = RestoreMeter(layer_groups=5, sides=2, segment_pages=32, threads=3, clock=clock)
    assert meter.model() is None
    for coded_bytes in [7_000, 40_000, 300_000, 1_000_000] * 5:
        meter.queued(coded_bytes)
        for _ in range(10):
            meter.part_ended(coded_bytes, 0.002 + 1e-8 * coded_bytes / 10)
    model = meter.model()
    assert (model.part_s, model.byte_s) == (about(0.002), about(1e-8))
    assert (model.parts, model.threads, model.layer_groups, model.segment_pages) == (10, 3, 5, 32)
    assert model.queued_s == pytest.approx(0, abs=1e-9)
    meter.queued(3_000_000)
    meter.part_ended(3_000_000, None)
    assert meter.model().queued_s == about(0.01 * 9 / 10)


def restore_meter(clock):
    return RestoreMeter(layer_groups=1, sides=1, segment_pages=32, threads=1, clock=clock)


def test_what_one_tier_takes_says_nothing_of_another():
    meter = restore_meter(Clock())
    meter.part_ended(1000, 9.0, None, "exact")
    assert meter.model(profile_name="exact").seconds(1, 1000) == about(9.0)
    assert meter.model(profile_name="raw") is None
    meter.part_ended(1000, 1.0, None, "raw")
    assert meter.model(profile_name="raw").seconds(1, 1000) == about(1.0)
    assert meter.model(profile_name="exact").seconds(1, 1000) == about(9.0)


def test_an_old_restore_rate_is_doubted_until_the_next_restore():
    clock = Clock()
    meter = restore_meter(clock)
    meter.part_ended(1000, 9.0)
    clock.now_s += RESTORE_DOUBTED_S - 1
    assert not meter.model().is_doubted
    clock.now_s += 2
    assert meter.model().is_doubted
    assert meter.model().seconds(1, 1000) == about(9.0)
    # What is queued will tell.
    meter.queued(1000)
    assert not meter.model().is_doubted
    meter.part_ended(1000, 9.0)
    assert not meter.model().is_doubted


def test_a_tier_is_unknown_again_after_only_others_were_restored_for_long():
    clock = Clock()
    meter = restore_meter(clock)
    meter.part_ended(1000, 9.0, None, "exact")
    meter.part_ended(1000, 1.0, None, "raw")
    # A pause changes nothing.
    clock.now_s += 2 * TIER_FORGOTTEN_S
    assert meter.model(profile_name="raw").seconds(1, 1000) == about(1.0)
    meter.part_ended(1000, 9.0, None, "exact")
    assert meter.model(profile_name="raw") is None
    assert meter.model(profile_name="exact").seconds(1, 1000) == about(9.0)
    meter.part_ended(1000, 2.0, None, "raw")
    clock.now_s += TIER_FORGOTTEN_S - 1
    meter.part_ended(1000, 9.0, None, "exact")
    # Nothing of what it was before.
    assert meter.model(profile_name="raw").seconds(1, 1000) == about(2.0)
    assert meter.model(profile_name="exact").seconds(1, 1000) == about(9.0)


def test_what_is_queued_may_be_of_the_slowest_tier():
    meter = restore_meter(Clock())
    assert meter.slowest() is None
    for profile_name, seconds in (("exact", 9.0), *[("raw", 1.0)] * 50):
        meter.part_ended(1000, seconds, None, profile_name)
    meter.renew()
    meter.queued(2000)
    assert meter.model().queued_s == about(2.0)
    assert meter.slowest().queued_s == about(18.0)
