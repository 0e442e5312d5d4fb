import pytest
from latency.samples_kit import sample

from sglang_kvcodec.latency.rows import Found, flat
from sglang_kvcodec.latency.samples import Method

EXACT = [Method("prefill"), Method("exact", "exact", "always")]


def rows_by(found):
    return {(row["bandwidth"], row["method"]): row for row in found.rows()}


def test_ratios_are_within_a_repeat_and_the_planners_rivals_are_those_an_oracle_may_choose(samples, methods):
    found = Found(samples, methods)
    assert found.bandwidths == ["10Mbps", "unlimited"]
    assert found.names() == ["prefill", "device", "exact", "high", "planner", "planner_first"]
    rows = rows_by(found)
    assert len(rows) == 12
    exact = rows["10Mbps", "exact"]
    assert (exact["ttft_s_median"], exact["ratio_to_prefill_median"]) == (12.0, 8.0)
    assert (exact["profile"], exact["plan"], exact["bits_per_s"]) == ("exact", "always", 10_000_000)
    assert exact["compression_ratio"] == 3.0
    # Not the 0.1 s of a server that has all in its own pool, nor its own first try.
    assert found.planner_over_best() == {"10Mbps": pytest.approx(1.1), "unlimited": pytest.approx(1.25)}
    assert rows["unlimited", "planner"]["over_best_median"] == 1.25
    assert rows["unlimited", "planner_first"]["over_best_median"] == 1.0
    assert rows["unlimited", "planner"]["reasons"] == "fetch_all fetch_all"
    assert "over_best_median" not in exact


def test_without_a_planner_nothing_is_said_of_one():
    found = Found([sample("prefill"), sample("device"), sample("exact")], EXACT)
    assert found.planner_over_best() == {}
    assert found.worth_a_picture() is None


def test_either_answer_of_the_server_without_kvcodec_is_right():
    baselines = [sample("prefill", text="one"), sample("device", text="two")]
    for text in ("one", "two"):
        assert Found([*baselines, sample("exact", text=text)], EXACT).broken_words() == []


def test_other_words_of_a_lossless_tier_are_told_and_those_of_a_lossy_one_are_counted():
    methods = [*EXACT, Method("high", "high", "always")]
    samples = [sample("prefill", text="abcd"), sample("device", text="abcd")]
    found = Found([*samples, sample("exact", text="abXd"), sample("high", text="aXcd")], methods)
    assert found.broken_words() == ["exact at unlimited, repeat 1: at character 2: 'abXd' against 'abcd'"]
    rows = rows_by(found)
    assert (rows["unlimited", "high"]["same_words"], rows["unlimited", "high"]["same_words_share_mean"]) == (0, 0.25)
    assert rows["unlimited", "exact"]["same_words_share_mean"] == 0.5


def test_words_are_compared_within_a_repeat():
    samples = [sample(name, repeat=repeat, text=f"{repeat}") for name in ("prefill", "device") for repeat in (1, 2)]
    samples += [sample("exact", repeat=1, text="2"), sample("exact", repeat=2, text="2")]
    assert [words.partition(":")[0] for words in Found(samples, EXACT).broken_words()] == [
        "exact at unlimited, repeat 1"
    ]


@pytest.mark.parametrize(
    ("profile", "is_lossless"), [("raw", True), ("exact", True), ("high", False), ("high,balanced", False), ("", False)]
)
def test_what_is_lossless(profile, is_lossless):
    assert Method("m", profile, "always").is_lossless is is_lossless


def test_the_picture_is_of_the_slowest_bandwidth_at_which_the_planner_fetched(samples, methods):
    assert Found(samples, methods).worth_a_picture() == "planner-unlimited-1"
    slow = [s for s in samples if s.bandwidth == "10Mbps"]
    assert Found(slow, methods).worth_a_picture() == "planner_first-10Mbps-1"
    nothing = [s for s in slow if s.method != "planner_first"]
    assert Found(nothing, methods).worth_a_picture() == "planner-10Mbps-2"


def test_nested_values_in_a_line():
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": ["x", 3]}) == {"a_b": 1, "a_c_d": 2, "e": "x 3"}
