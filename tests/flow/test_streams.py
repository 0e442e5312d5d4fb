import torch

from sglang_kvcodec.flow.streams import HostStream, stream_of
from sglang_kvcodec.testing.rehearsal_streams import RehearsalStreams


def test_in_host_memory_all_has_been_done_when_a_call_returns():
    stream = stream_of(torch.device("cpu"), 7)
    assert isinstance(stream, HostStream)
    values = torch.arange(5)
    with stream.working():
        copy = stream.read(values)
    values.zero_()
    assert copy.wait().tolist() == [0, 1, 2, 3, 4]
    event = stream.record()
    assert event.query()
    event.synchronize()


def test_a_host_stream_waits_for_the_events_of_others():
    streams = RehearsalStreams()
    HostStream().wait_for([streams.new_event("a"), streams.new_event("b")])
    assert streams.log == [("host waits for", "a"), ("host waits for", "b")]


def test_a_rehearsal_keeps_the_order_of_what_was_asked():
    streams = RehearsalStreams()
    stream = streams(torch.device("cpu"), 5)
    after = streams.new_event("after")
    with stream.working():
        copy = stream.read(torch.ones(2))
        stream.wait_for([after])
        event = stream.record()
    assert copy.wait().tolist() == [1, 1]
    assert streams.log == [
        (5, "work"),
        (5, "read"),
        (5, "wait", "after"),
        (5, "record", event.name),
        ("host waits for", "what was read"),
    ]
