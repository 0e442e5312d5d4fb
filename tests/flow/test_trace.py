import json
import threading

import pytest
from flow_kit import LIMIT_S

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.flow import trace as trace_module
from sglang_kvcodec.flow.trace import FileTracer, Tracer, open_tracer


def events(path, kinds="bexCX"):
    return [event for event in json.loads(path.read_text()) if event["ph"] in kinds]


def test_a_trace_is_json_with_microseconds(tmp_path):
    tracer = FileTracer(tmp_path / "t.json", "a server")
    tracer.span("r1", "fetch", 1.0, 1.5, pages=3)
    tracer.work("decode", 2.0, 2.25, group=1)
    tracer.counter("link", bytes_per_s=7.0)
    tracer.close()
    tracer.close()
    begin, end, work, counter = events(tmp_path / "t.json")
    assert (begin["ph"], begin["name"], begin["id"], begin["ts"], begin["args"]) == (
        "b",
        "fetch",
        "r1",
        1e6,
        {"pages": 3},
    )
    assert (end["ph"], end["name"], end["id"], end["ts"]) == ("e", "fetch", "r1", 1.5e6)
    assert (work["ph"], work["ts"], work["dur"]) == ("X", 2e6, 250_000)
    assert work["tid"] == threading.get_native_id()
    assert counter["args"] == {"bytes_per_s": 7.0}
    names = {event["name"]: event["args"]["name"] for event in events(tmp_path / "t.json", "M")}
    assert names == {"process_name": "a server", "thread_name": threading.current_thread().name}


def test_values_that_json_does_not_know_are_told_in_words(tmp_path):
    tracer = FileTracer(tmp_path / "t.json", "a server")
    tracer.span("r", "plan", 1.0, 0.5, error=ValueError("no"), text='"\n')
    tracer.close()
    begin, end = events(tmp_path / "t.json")
    assert begin["args"] == {"error": "no", "text": '"\n'}
    assert end["ts"] == begin["ts"]


def test_a_file_that_is_still_written_lacks_its_bracket_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_module, "_PERIOD_S", 0.001)
    tracer = FileTracer(tmp_path / "t.json", "a server")
    tracer.counter("x", y=1.0)
    pause = threading.Event()
    while '"x"' not in (text := (tmp_path / "t.json").read_text()):
        assert not pause.wait(0.005)
    assert len(json.loads(text + "]")) == 2
    tracer.close()


def test_the_file_is_bounded_and_still_json(tmp_path):
    tracer = FileTracer(tmp_path / "t.json", "a server", max_bytes=2000)
    for i in range(500):
        tracer.span(f"r{i}", "fetch", i, i + 1)
    tracer.close()
    assert 0 < len(events(tmp_path / "t.json")) < 30
    assert (tmp_path / "t.json").stat().st_size < 2100


def test_the_queue_is_bounded(tmp_path, monkeypatch, delta):
    monkeypatch.setattr(trace_module, "MAX_QUEUED_EVENTS", 4)
    monkeypatch.setattr(trace_module, "_PERIOD_S", LIMIT_S)
    tracer = FileTracer(tmp_path / "t.json", "a server")
    for _ in range(50):
        tracer.counter("x", y=1.0)
    tracer.close()
    written = len(events(tmp_path / "t.json", "C"))
    assert delta("kvcodec_trace_drops_total") == 50 - written > 0


def test_events_of_many_threads_are_all_there(tmp_path):
    tracer = FileTracer(tmp_path / "t.json", "a server")

    def tell():
        for i in range(200):
            tracer.work("w", i, i + 1)

    threads = [threading.Thread(target=tell) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tracer.close()
    found = events(tmp_path / "t.json")
    assert len(found) == 800
    assert len({event["tid"] for event in found}) >= 1


def test_ranks_write_files_of_their_own(tmp_path):
    for rank in (0, 1):
        open_tracer(str(tmp_path / "t.json"), f"rank {rank}", rank).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.json", "t.rank1.json"]


def test_without_a_file_nothing_happens(tmp_path):
    tracer = open_tracer("", "a server", 0)
    assert not tracer.is_on
    tracer.span("r", "fetch", 0, 1)
    tracer.work("w", 0, 1)
    tracer.counter("c", x=1.0)
    tracer.close()
    assert type(tracer) is Tracer


def test_a_file_that_can_not_be_written_is_said_at_start(tmp_path):
    with pytest.raises(ConfigurationError, match=r"the trace .*nowhere.* can't be written"):
        open_tracer(str(tmp_path / "nowhere" / "t.json"), "a server", 0)
