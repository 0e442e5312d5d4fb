"""What counters said over the last minutes: rates, increases, and no more samples than asked for."""

from sglang_kvcodec.status.history import History


def test_rates_are_per_second_between_samples():
    history = History(9)
    for at_s, sent in ((10.0, 100), (12.0, 100), (13.0, 350), (17.0, 750)):
        history.add(at_s, {"sent": sent})
    assert history.rates("sent") == [0, 250, 100]
    assert history.increase("sent") == 650
    assert history.span_s == 7


def test_a_counter_that_is_not_there_yet_stands_at_0():
    history = History(9)
    history.add(1.0, {})
    history.add(2.0, {"late": 3})
    assert history.rates("late") == [3]
    assert history.increase("late") == 3
    assert history.rates("never") == [0]
    assert history.increase("never") == 0


def test_before_there_is_anything_to_compare():
    history = History(2)
    assert (history.rates("x"), history.increase("x"), history.span_s) == ([], 0, 0)
    history.add(5.0, {"x": 7})
    assert (history.rates("x"), history.increase("x"), history.span_s) == ([], 0, 0)


def test_only_the_last_samples_count():
    history = History(3)
    for second in range(11):
        history.add(second, {"x": second**2})
    assert history.rates("x") == [17, 19]
    assert history.increase("x") == 36


def test_two_samples_at_one_time_divide_by_nothing():
    history = History(3)
    history.add(1.0, {"x": 1})
    history.add(1.0, {"x": 1})
    assert history.rates("x") == [0]
