import pytest
from latency.samples_kit import sample

from sglang_kvcodec.latency.samples import Method

METHODS = [
    Method("prefill"),
    Method("planner", "high", "auto"),
    Method("exact", "exact", "always"),
    Method("high", "high", "always"),
]


@pytest.fixture
def methods():
    return METHODS


@pytest.fixture
def samples():
    """Two repeats at two bandwidths; the second repeat is twice as slow throughout."""
    ttfts_s = {
        "10Mbps": {"prefill": 1.0, "device": 0.1, "exact": 8.0, "high": 4.0, "planner_first": 2.0, "planner": 1.1},
        "unlimited": {"prefill": 1.0, "device": 0.1, "exact": 0.5, "high": 0.4, "planner_first": 0.4, "planner": 0.5},
    }
    return [
        sample(name, bandwidth, repeat, ttft_s * repeat)
        for bandwidth, of_it in ttfts_s.items()
        for name, ttft_s in of_it.items()
        for repeat in (1, 2)
    ]
