"""With simulated clocks: what is measured, how fast it follows a change, and what it makes of outliers."""

import itertools
import random
import threading

import pytest
from flow_kit import new_rates
from hypothesis import given
from hypothesis import strategies as st

from sglang_kvcodec.flow import rates as rates_module
from sglang_kvcodec.flow.fitting import OnlineFit
from sglang_kvcodec.flow.rates import LEAST_KNOWN_TOKENS, LinkMeter, PrefillMeter, PrefillModel, RestoreMeter


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


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


def about(value, share=0.05):
    return pytest.approx(value, rel=share)


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


# ---- prefill ----

TRUTH = PrefillModel(0.01, 2e-4, 3e-8)


def passes(meter, truth, lengths, noise=0.0, seed=1):
    drawn = random.Random(seed)
    for new, prefix in lengths:
        meter.forward_pass([new], [prefix], truth.seconds(new, prefix) * (1 + noise * drawn.uniform(-1, 1)))


LENGTHS = [(17, 0), (503, 0), (1021, 64), (4099, 0), (8191, 8192), (256, 16384), (64, 2048), (2003, 101)]


def test_prefill_is_unknown_at_first():
    assert PrefillMeter().model() is None


@pytest.mark.parametrize(("new", "prefix"), [(100, 0), (3000, 7000), (16000, 0)])
def test_prefill_is_learnt_for_lengths_not_seen(new, prefix):
    meter = PrefillMeter()
    passes(meter, TRUTH, LENGTHS * 3, noise=0.05)
    assert meter.model().seconds(new, prefix) == about(TRUTH.seconds(new, prefix), 0.1)


def test_one_length_alone_is_taken_to_be_proportional():
    meter = PrefillMeter()
    passes(meter, TRUTH, [(1000, 0)] * 4)
    assert meter.model().seconds(1000, 0) == about(TRUTH.seconds(1000, 0))
    assert meter.model().seconds(2000, 0) == about(2 * TRUTH.seconds(1000, 0))


def test_several_requests_of_a_pass_count_together():
    meter = PrefillMeter()
    for first, second in itertools.pairwise(LENGTHS):
        seconds = sum(TRUTH.seconds(*each) for each in (first, second)) - TRUTH.pass_s
        meter.forward_pass([first[0], second[0]], [first[1], second[1]], seconds)
    assert meter.model().seconds(1500, 100) == about(TRUTH.seconds(1500, 100), 0.1)


@pytest.mark.parametrize("factor", [0.25, 2, 10])
def test_prefill_follows_a_change_within_a_second_of_ten_passes(factor):
    meter = PrefillMeter()
    passes(meter, TRUTH, LENGTHS * 8)
    slower = PrefillModel(TRUTH.pass_s * factor, TRUTH.token_s * factor, TRUTH.pair_s * factor)
    passes(meter, slower, (LENGTHS * 2)[:10])
    assert meter.model().seconds(1000, 0) == about(slower.seconds(1000, 0), 0.2)


@pytest.mark.parametrize("factor", [0.02, 50])
def test_prefill_forgets_outliers(factor):
    meter = PrefillMeter()
    passes(meter, TRUTH, LENGTHS * 3)
    for _ in range(2):
        meter.forward_pass([900], [0], TRUTH.seconds(900, 0) * factor)
        passes(meter, TRUTH, LENGTHS[:2])
    assert meter.model().seconds(1000, 0) == about(TRUTH.seconds(1000, 0), 0.15)


def test_passes_are_counted_by_the_bound_of_a_pass():
    assert PrefillModel(1.0, 0, 0, 256).seconds(513, 0) == 3
    assert PrefillModel(1.0, 0, 0, 256).seconds(0, 7) == 0
    assert PrefillModel(1.0, 0, 0).seconds(513, 0) == 1


@given(st.lists(st.tuples(st.integers(1, 10**5), st.integers(0, 10**5), st.floats(1e-6, 1e3)), min_size=1, max_size=80))
def test_whatever_is_measured_a_longer_prompt_never_takes_less(samples):
    meter = PrefillMeter()
    for new, prefix, seconds in samples:
        meter.forward_pass([new], [prefix], seconds)
    # Of short passes alone it says nothing.
    assert (meter.model() is None) == (max(new for new, _, _ in samples) < LEAST_KNOWN_TOKENS)
    meter.forward_pass([LEAST_KNOWN_TOKENS], [0], 1.0)
    model = meter.model()
    values = [model.seconds(new, 10) for new in (1, 10, 1000, 10**6)]
    assert values == sorted(values)
    assert values[-1] > 0


def test_who_asks_while_the_first_samples_are_fitted_waits_for_them(monkeypatch):
    fit = OnlineFit(1, primary=0)
    fit.add((1.0,), 2.0)
    is_fitting, go_on, fitted = threading.Event(), threading.Event(), OnlineFit._fit

    def slowly(self, samples):
        is_fitting.set()
        assert go_on.wait(30)
        return fitted(self, samples)

    monkeypatch.setattr(OnlineFit, "_fit", slowly)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(fit.coefficients())) for _ in range(2)]
    threads[0].start()
    assert is_fitting.wait(30)
    threads[1].start()
    threads[1].join(0.05)
    go_on.set()
    for thread in threads:
        thread.join()
    assert answers[0] == answers[1] == (pytest.approx(2.0),)


def test_a_sample_that_says_nothing_is_left_out():
    fit = OnlineFit(2, primary=1)
    for features, seconds in [((0, 0), 1), ((1, 2), 0), ((1, 2), -1), ((1, 2, 3), 1)]:
        fit.add(features, seconds)
    assert fit.coefficients() is None


# ---- restore ----


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


def test_a_scheduler_gets_what_was_fitted_last_and_a_restore_renews_it():
    rates = new_rates()
    rates.prefill.forward_pass([100], [0], 1.0)
    assert rates.prefill.model(refit=False) is None
    rates.restore.queued(2000)
    rates.restore.part_ended(2000, 0.5)
    assert rates.restore.model(refit=False) is None
    rates.restore.part_ended(2000, 0.5)
    assert rates.prefill.model(refit=False).seconds(100, 0) == about(1.0)
    assert rates.restore.model(refit=False).seconds(1, 2000) == about(0.5)


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
    clock.now_s += rates_module.RESTORE_DOUBTED_S - 1
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
    clock.now_s += 2 * rates_module.TIER_FORGOTTEN_S
    assert meter.model(profile_name="raw").seconds(1, 1000) == about(1.0)
    meter.part_ended(1000, 9.0, None, "exact")
    assert meter.model(profile_name="raw") is None
    assert meter.model(profile_name="exact").seconds(1, 1000) == about(9.0)
    meter.part_ended(1000, 2.0, None, "raw")
    clock.now_s += rates_module.TIER_FORGOTTEN_S - 1
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


def test_a_scheduler_gets_what_was_fitted_last_of_a_tier():
    rates = new_rates()
    rates.restore.queued(2000)
    rates.restore.part_ended(2000, 0.5, None, "raw")
    assert rates.restore.model(refit=False, profile_name="raw") is None
    rates.restore.part_ended(2000, 0.5, None, "raw")
    assert rates.restore.model(refit=False, profile_name="raw").seconds(1, 2000) == about(0.5)


REDUNDANT = PrefillModel(0.04, 1e-4, 0.0, 256, 9e-8)
"""Of a backend whose attention asks for all tokens again in each pass."""


def pass_s(model, new, prefix):
    """One pass of at most ``pass_tokens``, in plain words."""
    return (
        model.pass_s
        + model.token_s * new
        + model.pair_s * new * (prefix + new / 2)
        + model.whole_s * (prefix + new) ** 2
    )


@given(
    new=st.integers(0, 5000),
    prefix=st.integers(0, 5000),
    pass_tokens=st.sampled_from([0, 1, 64, 256, 8192]),
)
def test_a_prompt_takes_as_long_as_its_passes(new, prefix, pass_tokens):
    model = PrefillModel(0.04, 1e-4, 1e-9, pass_tokens, 9e-8)
    expected, done = 0.0, 0
    while done < new:
        chunk = min(pass_tokens or new, new - done)
        expected += pass_s(model, chunk, prefix + done)
        done += chunk
    assert model.seconds(new, prefix) == pytest.approx(expected)


def test_a_backend_that_computes_attention_anew_for_all_tokens_is_learnt():
    meter = PrefillMeter(256)
    for prompt in (2000, 1200):
        for prefix in range(0, prompt, 256):
            new = min(256, prompt - prefix)
            meter.forward_pass([new], [prefix], pass_s(REDUNDANT, new, prefix))
        # Hits, of which little is left to compute.
        for _ in range(5):
            meter.forward_pass([60], [prompt], pass_s(REDUNDANT, 60, prompt))
    learnt = meter.model()
    for new, prefix in [(2000, 0), (60, 1984), (1000, 1000)]:
        assert learnt.seconds(new, prefix) == pytest.approx(REDUNDANT.seconds(new, prefix), rel=0.1)
