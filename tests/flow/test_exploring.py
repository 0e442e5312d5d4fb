from sglang_kvcodec.flow import exploring
from sglang_kvcodec.flow.exploring import BYTES, MAX_PAUSE_S, PAUSE_S, Explorer


def test_what_is_new_is_not_measured_again():
    assert Explorer().pages(PAUSE_S - 0.01, [10]) == 0
    assert Explorer().pages(float("inf"), [10]) == 1


def test_few_bytes_but_one_page_are_tried():
    assert Explorer().pages(99, []) == 0
    assert Explorer().pages(99, [BYTES + 1, 1]) == 1
    assert Explorer().pages(99, [BYTES // 4] * 9) == 4


def test_one_at_a_time():
    explorer = Explorer()
    assert explorer.begin()
    assert not explorer.begin()
    explorer.end()
    assert explorer.begin()


def test_pauses_grow_while_the_link_is_slow_and_only_then():
    explorer = Explorer()
    for _ in range(9):
        assert explorer.begin()
        explorer.end()
    assert explorer.pages(MAX_PAUSE_S - 0.01, [10]) == 0
    assert explorer.pages(MAX_PAUSE_S, [10]) == 1
    explorer.found_fast()
    assert explorer.pages(PAUSE_S, [10]) == 1


def test_it_ends_when_something_was_measured_or_it_takes_too_long(monkeypatch):
    monkeypatch.setattr(exploring.time, "monotonic", lambda: 100.0)
    explorer = Explorer()
    assert not explorer.is_enough(0.0, 99.9)
    assert explorer.is_enough(0.0, 99.5)
    assert not explorer.is_enough(0.7, 99.5)
    assert explorer.is_enough(float("inf"), 95.0)
