"""A decoder's stream as the restorer uses it, on a real GPU; scripts/test-gpu runs it."""

import pytest
import torch

from sglang_kvcodec.flow.streams import stream_of
from sglang_kvcodec.kernels.upload import upload
from sglang_kvcodec.video.cuda_driver import CudaDriver

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)

SLEEP_CYCLES = 200_000_000
"""A tenth of a second or so: the host is far ahead of what it queues."""


@pytest.fixture
def stream():
    driver = CudaDriver(0)
    handle = driver.new_stream()
    yield stream_of(DEVICE, handle)
    driver.synchronize(handle)
    driver.return_stream(handle)


def test_what_is_read_is_what_was_queued_before_and_not_what_comes_later(stream):
    with stream.working():
        torch.cuda._sleep(SLEEP_CYCLES)
        values = torch.ones(1000, device=DEVICE)
        copy = stream.read(values)
        values.fill_(2)
        later = stream.record()
    assert copy.wait().tolist() == [1.0] * 1000
    later.synchronize()
    assert values.tolist() == [2.0] * 1000


def test_a_stream_waits_for_the_events_of_others_and_the_host_does_not(stream):
    other = torch.cuda.Stream(DEVICE)
    values = torch.zeros(1000, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(SLEEP_CYCLES)
        values.fill_(3)
        written = other.record_event()
    with stream.working():
        stream.wait_for([written])
        copy = stream.read(values)
    assert not written.query()
    assert copy.wait().tolist() == [3.0] * 1000


def test_an_upload_does_not_wait_for_what_is_queued_before_it(stream):
    # Once, so that pinned memory is there: its allocation may wait.
    upload(torch.zeros(1 << 20), DEVICE)
    torch.cuda.synchronize()
    values = torch.arange(1 << 20)
    with stream.working():
        torch.cuda._sleep(SLEEP_CYCLES)
        slept = stream.record()
        there = upload(values, DEVICE)
        assert not slept.query()
        values_there = stream.read(there)
    assert torch.equal(values_there.wait(), torch.arange(1 << 20))


def test_memory_used_on_a_stream_may_be_freed_after_the_stream_was_given_back():
    """As exceptions do, whose frames hold what was being read when they were raised."""
    driver = CudaDriver(0)
    handle = driver.new_stream()
    stream = stream_of(DEVICE, handle)
    with stream.working():
        copy = stream.read(torch.ones(1000, device=DEVICE))
    assert copy.wait().sum() == 1000
    driver.return_stream(handle)
    del copy
    assert driver.new_stream() == handle
    driver.return_stream(handle)
