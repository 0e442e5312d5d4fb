import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_lm.kneser_ney import KneserNey

VOCABULARY = 11
streams = st.lists(st.integers(0, VOCABULARY - 1), min_size=7, max_size=160).map(lambda ids: np.array(ids, np.uint16))


def distribution(model: KneserNey, context: list[int]) -> np.ndarray:
    """P of every token after a context."""
    return np.array([model.probabilities(np.array([*context, token]))[-1] for token in range(model.vocabulary)])


def counting_text(tokens: int, seed: int) -> np.ndarray:
    """Runs that count upwards from a random start, modulo the vocabulary."""
    random = np.random.default_rng(seed)
    runs = [(start + np.arange(random.integers(2, 9))) % VOCABULARY for start in random.integers(0, VOCABULARY, tokens)]
    return np.concatenate(runs)[:tokens].astype(np.uint16)


@settings(max_examples=60)
@given(streams, st.integers(1, 5), st.lists(st.integers(0, VOCABULARY - 1), max_size=6))
def test_probabilities_after_any_context_sum_to_one(stream, order, context):
    probabilities = distribution(KneserNey(stream, order, VOCABULARY), context)
    assert (probabilities > 0).all()
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("order", [2, 3, 5])
def test_more_context_beats_a_unigram(order):
    text, unseen = counting_text(3001, 1), counting_text(997, 2)
    losses = {n: -np.log(KneserNey(text, n, VOCABULARY).probabilities(unseen)).mean() for n in (1, order)}
    assert losses[1] == pytest.approx(math.log(VOCABULARY), abs=0.05)
    assert losses[order] < 0.6 * losses[1]


def test_a_bigram_is_what_the_formula_says():
    # a b a c a b a d. Bigrams: ab twice, ba twice, ac, ca, ad once: n1 = 3, n2 = 2, n3 = 0.
    a, b, c, d, unseen = range(5)
    model = KneserNey(np.array([a, b, a, c, a, b, a, d]), 2, 5)
    once = 1 - 2 * 3 / (3 + 2 * 2) * 2 / 3
    twice = 1.0  # the estimate for n-grams seen twice is all of them, so the fallback
    # different tokens before a: b, c; before b, c and d: a. Five in all: n1 = 3, n2 = 1.
    once_lower, twice_lower = 1 - 2 * 3 / (3 + 2 * 1) * 1 / 3, 1.0
    uniform = (3 * once_lower + twice_lower) / 5 / 5
    lower = {a: (2 - twice_lower) / 5 + uniform, unseen: uniform}
    lower |= dict.fromkeys((b, c, d), (1 - once_lower) / 5 + uniform)
    given_up = (twice + 2 * once) / 4
    expected = {token: given_up * lower[token] for token in (a, unseen)}
    expected |= {b: (2 - twice) / 4 + given_up * lower[b], c: (1 - once) / 4 + given_up * lower[c]}
    probabilities = distribution(model, [a])
    for token, probability in expected.items():
        assert probabilities[token] == pytest.approx(probability), token


def test_the_first_tokens_are_predicted_from_what_there_is():
    text = counting_text(499, 3)
    model = KneserNey(text, 4, VOCABULARY)
    both = model.probabilities(text[:7])
    assert both[0] == pytest.approx(model.probabilities(text[:1])[0])
    assert both[2] == pytest.approx(model.probabilities(text[:3])[2])


def test_only_the_last_tokens_of_a_context_count():
    model = KneserNey(counting_text(499, 4), 3, VOCABULARY)
    assert distribution(model, [9, 1, 2, 3]) == pytest.approx(distribution(model, [2, 3]))


@pytest.mark.parametrize(("stream", "order", "vocabulary"), [([1] * 9, 6, 4096), ([1] * 9, 0, 7), ([1, 2], 3, 7)])
def test_what_cannot_be_counted_is_refused(stream, order, vocabulary):
    with pytest.raises(ValueError, match="tokens"):
        KneserNey(np.array(stream), order, vocabulary)
