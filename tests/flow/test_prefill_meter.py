import itertools
import random
import threading

import pytest
from flow_kit import about
from hypothesis import given
from hypothesis import strategies as st

from sglang_kvcodec.flow.fitting import OnlineFit
from sglang_kvcodec.flow.prefill_meter import LEAST_KNOWN_TOKENS, PrefillMeter, PrefillModel

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
