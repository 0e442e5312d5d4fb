import itertools
import xml.etree.ElementTree

import pytest
from latency.trace_kit import computed, fetched, tracer

from sglang_kvcodec.errors import NotFoundError
from sglang_kvcodec.latency.gantt import draw, gantt_of
from sglang_kvcodec.latency.trace_file import read_trace


@pytest.fixture
def traced(tmp_path):
    """Writes a trace and reads it."""

    def write(tell):
        trace = tracer(tmp_path / "trace.json")
        tell(trace)
        trace.close()
        return read_trace(tmp_path / "trace.json")

    return write


def rows_of(gantt):
    return {row.name: row for row in gantt.rows}


def test_a_request_from_queue_to_first_token(traced):
    gantt = gantt_of(traced(fetched), "r1")
    rows = rows_of(gantt)
    assert list(rows) == ["queued", "lookup", "wire", "held", "decode", "restore", "wait for layer", "forward"]
    assert gantt.duration_s == pytest.approx(1.0)
    assert rows["wire"].busy_s == pytest.approx(0.54)
    assert [mark.label for mark in gantt.marks] == ["plan"]
    assert gantt.plan == "fetch_all high"
    assert not gantt.is_shared
    assert [bar.label for lane in rows["wait for layer"].lanes for bar in lane] == ["0", "3"]
    assert [bar.label for lane in rows["forward"].lanes for bar in lane] == ["25 tokens"]


def test_what_overlaps_is_in_lanes_of_its_own(traced):
    decode = rows_of(gantt_of(traced(fetched), "r1"))["decode"]
    assert sorted(bar.label for lane in decode.lanes for bar in lane) == ["0K", "0V", "1K", "1V"]
    assert len(decode.lanes) == 2
    for lane in decode.lanes:
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(lane))


def test_work_of_other_times_is_not_shown_and_that_of_others_is_told(traced):
    def apart(trace):
        fetched(trace, "r1", 100.0)
        fetched(trace, "r2", 200.0)

    gantt = gantt_of(traced(apart), "r2")
    assert not gantt.is_shared
    assert rows_of(gantt)["decode"].busy_s == pytest.approx(0.32)

    def together(trace):
        fetched(trace, "r1", 100.0)
        fetched(trace, "r2", 100.1)

    assert gantt_of(traced(together), "r2").is_shared

    def after_its_restore(trace):
        fetched(trace, "r1", 100.0)
        fetched(trace, "r2", 100.3)

    gantt = gantt_of(traced(after_its_restore), "r1")
    assert not gantt.is_shared
    assert rows_of(gantt)["decode"].busy_s == pytest.approx(0.32)


def test_a_request_that_was_computed_shows_no_work_of_others(traced):
    def tell(trace):
        fetched(trace, "r1", 100.0)
        computed(trace, "r2", 100.5)

    assert list(rows_of(gantt_of(traced(tell), "r2"))) == ["lookup", "forward"]


def test_a_request_without_a_first_token_ends_with_what_is_known(traced):
    gantt = gantt_of(traced(lambda trace: trace.span("r1", "lookup", 5.0, 5.5)), "r1")
    assert gantt.duration_s == pytest.approx(0.5)


def test_on_a_gpu_restoring_is_known_as_a_whole(traced):
    def tell(trace):
        trace.span("r1", "wire", 1.0, 2.0)
        trace.work("decode", 2.0, 2.2, group=0, side="KEY")
        trace.span("r1", "restore", 2.0, 2.5)

    assert rows_of(gantt_of(traced(tell), "r1"))["restore"].busy_s == pytest.approx(0.5)


def test_a_stage_of_a_later_version_gets_a_row(traced):
    def tell(trace):
        fetched(trace)
        trace.span("r1", "teleport", 100.1, 100.2)

    assert list(rows_of(gantt_of(traced(tell), "r1")))[-1] == "teleport"


def test_an_unknown_request(traced):
    with pytest.raises(NotFoundError):
        gantt_of(traced(fetched), "r7")


def test_the_picture_names_its_rows(traced, tmp_path):
    draw(tmp_path / "g.svg", gantt_of(traced(fetched), "r1"))
    words = " | ".join(
        element.text for element in xml.etree.ElementTree.parse(tmp_path / "g.svg").iter() if element.text
    )
    for name in ("queued", "lookup", "wire", "decode", "restore", "wait for layer", "forward", "plan", "request r1"):
        assert name in words


def test_a_picture_of_one_moment(traced, tmp_path):
    draw(tmp_path / "g.svg", gantt_of(traced(lambda trace: trace.span("r1", "plan", 5.0, 5.0)), "r1"))
    assert (tmp_path / "g.svg").stat().st_size > 500
