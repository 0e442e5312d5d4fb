import json

import pytest
from latency.trace_kit import computed, fetched, tracer

from sglang_kvcodec.errors import FormatError, NotFoundError
from sglang_kvcodec.latency.trace_file import read_trace


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.json"


@pytest.fixture
def whole(path):
    """A trace of two requests, the second of which fetched nothing, and of an exploration."""
    trace = tracer(path)
    fetched(trace, "r1")
    trace.span("explorations", "wire", 102.0, 103.0)
    trace.counter("link", bytes_per_s=1.0)
    computed(trace, "r2", 105.0)
    trace.close()
    return path


def test_requests_and_work_in_seconds(whole):
    trace = read_trace(whole)
    assert list(trace.requests) == ["r1", "r2"]
    wires = [span for span in trace.requests["r1"] if span.name == "wire"]
    assert [span.args["bytes"] for span in wires] == [1000, 3000]
    assert wires[1].start_s == pytest.approx(100.3)
    assert wires[1].duration_s == pytest.approx(0.3)
    assert sorted({span.name for span in trace.work}) == ["decode", "restore", "wait for layer 0", "wait for layer 3"]
    assert trace.unreadable_lines == 0


def test_the_newest_request_that_fetched_is_chosen(whole):
    assert read_trace(whole).newest() == "r1"


def test_a_request_that_is_not_there_is_told_with_those_that_are(whole):
    with pytest.raises(NotFoundError, match=r"no request 'r9'.*r1, r2"):
        read_trace(whole).spans_of("r9")


def test_a_file_may_end_anywhere(whole):
    text = whole.read_text()
    found = set()
    for length in range(2, len(text), 7):
        whole.write_text(text[:length])
        try:
            trace = read_trace(whole)
        except FormatError:
            # Not even the first event is whole.
            assert length < text.index("}}") + 2
            continue
        assert trace.unreadable_lines == 0
        found.add(len(trace.requests.get("r1", ())))
    # It grows span by span, whatever the last line was cut to.
    assert found == set(range(max(found) + 1))


def test_damage_in_the_middle_costs_its_lines_and_is_counted(whole):
    lines = whole.read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if '"lookup"' in line)
    lines[at] = lines[at][:20]
    lines.insert(at + 3, '{"ph":"b","cat":"request"},')
    whole.write_text("\n".join(lines))
    trace = read_trace(whole)
    assert trace.unreadable_lines == 2
    assert "lookup" not in [span.name for span in trace.requests["r1"]]
    assert "wire" in [span.name for span in trace.requests["r1"]]


def test_events_that_are_not_known_are_passed_over(path):
    trace = tracer(path)
    fetched(trace)
    trace._add(name="a flow", ph="s", cat="request", id="r1", ts=1)
    trace._add(name="later", ph="b", cat="another", id="r1", ts=1)
    trace.span("r1", "teleport", 100.2, 100.4)
    trace.close()
    assert {"teleport", "wire"} <= {span.name for span in read_trace(path).requests["r1"]}


def test_a_trace_that_was_written_anew_by_a_viewer(whole):
    events = json.loads(whole.read_text())
    whole.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, indent=2))
    assert list(read_trace(whole).requests) == ["r1", "r2"]


def test_a_server_that_was_not_asked_yet(path):
    tracer(path).close()
    trace = read_trace(path)
    assert trace.requests == {}
    with pytest.raises(NotFoundError, match="no request"):
        trace.newest()


@pytest.mark.parametrize(
    "text",
    ["", "hello\n", '{"a": 1}', "[1, 2]", '[\n{"ph":"X","name":"n","cat":"kernel","ts":1,"dur":1}\n]\n', "[\n", "\0\1"],
)
def test_foreign_files_are_refused(path, text):
    path.write_text(text)
    with pytest.raises(FormatError, match=r"trace\.json is no trace"):
        read_trace(path)


def test_a_file_that_is_not_there(path):
    with pytest.raises(NotFoundError, match=r"can't read .*trace\.json"):
        read_trace(path)
