"""The driver's calls, as far as they show without a driver: what is asked for, in what order, and how it fails."""

import ctypes

import numpy as np
import pytest

from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.video import cuda_driver
from sglang_kvcodec.video.cuda_driver import CudaDriver


class RecordingLibrary:
    """Stands for libcuda: every call succeeds but the one that is to fail."""

    def __init__(self):
        self.calls = []
        self.failing = None

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, arguments))
            if name == "cuStreamCreateWithPriority":
                arguments[0]._obj.value = 0x77
            elif name == "cuCtxGetStreamPriorityRange":
                arguments[1]._obj.value = -5
            elif name == "cuDriverGetVersion":
                arguments[0]._obj.value = 12040
            elif name == "cuDeviceGetName":
                arguments[0].value = b"A GPU"
            elif name == "cuMemGetInfo_v2":
                arguments[0]._obj.value = 123
            return 100 if name == self.failing else 0

        return call

    def names(self):
        return [name for name, _ in self.calls]


@pytest.fixture
def library(monkeypatch):
    made = RecordingLibrary()
    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda name: made)
    monkeypatch.setattr(cuda_driver, "_RETURNED_STREAMS", {})
    return made


def test_without_a_driver_it_says_so(monkeypatch):
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libno-such-driver.so.1")
    with pytest.raises(CodecError, match="no NVIDIA driver"):
        CudaDriver(0)


def test_a_call_that_fails_is_named(library):
    library.failing = "cuInit"
    with pytest.raises(CodecError, match="cuInit failed with CUDA error 100"):
        CudaDriver(0)


def test_the_primary_context_is_current_for_each_call_and_no_longer(library):
    driver = CudaDriver(3)
    assert library.names() == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    assert library.calls[1][1][1] == 3
    library.calls.clear()
    library.failing = "cuStreamSynchronize"
    with pytest.raises(CodecError):
        driver.synchronize(5)
    assert library.names() == ["cuCtxPushCurrent_v2", "cuStreamSynchronize", "cuCtxPopCurrent_v2"]


def test_streams_are_of_the_highest_priority_and_do_not_block(library):
    assert CudaDriver(0).new_stream() == 0x77
    (arguments,) = [arguments for name, arguments in library.calls if name == "cuStreamCreateWithPriority"]
    assert arguments[1] == 1
    assert arguments[2].value == -5


def test_a_stream_given_back_is_given_out_again_on_its_device_and_never_destroyed(library):
    driver = CudaDriver(0)
    stream = driver.new_stream()
    driver.return_stream(stream)
    library.calls.clear()
    assert CudaDriver(0).new_stream() == stream
    assert library.names() == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    CudaDriver(0).return_stream(stream)
    CudaDriver(1).new_stream()
    assert "cuStreamCreateWithPriority" in library.names()
    assert "cuStreamDestroy_v2" not in library.names()


def test_facts(library):
    driver = CudaDriver(0)
    assert (driver.device_name, driver.cuda_version, driver.free_bytes()) == ("A GPU", "12.4", 123)


def test_a_copy_of_rows_states_what_cuda_h_lays_out(library):
    target = np.zeros((7, 192), np.uint8)
    CudaDriver(0).copy_to_host(target, 0xABC000, 256, 9)
    (arguments,) = [arguments for name, arguments in library.calls if name == "cuMemcpy2DAsync_v2"]
    copy = arguments[0]._obj
    # Sixteen fields of eight bytes, enumerations padded: cuda.h on 64 bits.
    assert ctypes.sizeof(copy) == 128
    assert (copy.src_memory_type, copy.src_device, copy.src_pitch) == (2, 0xABC000, 256)
    assert (copy.dst_memory_type, copy.dst_host, copy.dst_pitch) == (1, target.ctypes.data, 192)
    assert (copy.width_bytes, copy.height) == (192, 7)
    assert type(copy).src_device.offset == 32
    assert type(copy).dst_memory_type.offset == 72
    assert arguments[1].value == 9
