import xml.etree.ElementTree

import pytest

from sglang_kvcodec.latency.picture import draw
from sglang_kvcodec.latency.rows import Found


def words_of(path):
    return {element.text for element in xml.etree.ElementTree.parse(path).iter() if element.text}


def test_it_names_every_method_and_bandwidth(tmp_path, samples, methods):
    draw(tmp_path / "a.svg", "a title", Found(samples, methods).rows())
    words = words_of(tmp_path / "a.svg")
    assert {"prefill", "device", "exact", "high", "planner", "planner, first", "10Mbps", "unlimited"} <= words
    assert "a title" in words


@pytest.mark.parametrize("bandwidth", ["10Mbps", "unlimited"])
def test_one_bandwidth_and_one_repeat_are_enough(tmp_path, samples, methods, bandwidth):
    one = [s for s in samples if s.bandwidth == bandwidth and s.repeat == 1]
    draw(tmp_path / "a.svg", "one", Found(one, methods).rows())
    assert bandwidth in words_of(tmp_path / "a.svg")
    draw(tmp_path / "a.png", "one", Found(one, methods).rows())
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
