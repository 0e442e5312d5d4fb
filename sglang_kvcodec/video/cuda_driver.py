"""The few calls of NVIDIA's driver that decoding needs, through ctypes, so that this layer does without torch.

Signatures: CUDA driver API reference, "Stream Management", "Memory Management", "Primary Context Management".
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from sglang_kvcodec.errors import CodecError

LIBRARY = "libcuda.so.1"
_NON_BLOCKING = 1
_HOST, _DEVICE = 1, 2
_RETURNED_STREAMS: dict[int, collections.deque[int]] = {}
"""By device: streams that nobody uses. The driver's own ``cuStreamDestroy`` is never called: torch's allocators record
an event on each stream that memory was used on when that memory is freed, which may be long after, and with a stream
that is gone the process dies."""


class _Copy2D(ctypes.Structure):
    """``CUDA_MEMCPY2D_v2`` of cuda.h."""

    _fields_ = (
        ("src_x_bytes", ctypes.c_size_t),
        ("src_y", ctypes.c_size_t),
        ("src_memory_type", ctypes.c_uint),
        ("src_host", ctypes.c_void_p),
        ("src_device", ctypes.c_uint64),
        ("src_array", ctypes.c_void_p),
        ("src_pitch", ctypes.c_size_t),
        ("dst_x_bytes", ctypes.c_size_t),
        ("dst_y", ctypes.c_size_t),
        ("dst_memory_type", ctypes.c_uint),
        ("dst_host", ctypes.c_void_p),
        ("dst_device", ctypes.c_uint64),
        ("dst_array", ctypes.c_void_p),
        ("dst_pitch", ctypes.c_size_t),
        ("width_bytes", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class CudaDriver:
    """One device's primary context, which is the one that torch uses. Thread-safe."""

    def __init__(self, device: int) -> None:
        """Initialises the driver and retains the context, for as long as the process lives.

        Raises:
            CodecError: there is no driver, or no such device.
        """
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise CodecError(f"there is no NVIDIA driver: {error}") from error
        self.device = device
        self._handle = ctypes.c_int()
        self._context = ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(self._handle), device)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._handle)

    @property
    def device_name(self) -> str:
        """What NVIDIA calls the device."""
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, len(name), self._handle)
        return name.value.decode(errors="replace")

    @property
    def cuda_version(self) -> str:
        """The newest CUDA that the driver knows, ``"12.4"``."""
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def free_bytes(self) -> int:
        """Memory of the device that nobody has allocated."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        with self._current():
            self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def new_stream(self) -> int:
        """A stream of the highest priority that does not synchronise with the default one."""
        with contextlib.suppress(KeyError, IndexError):
            return _RETURNED_STREAMS[self.device].pop()
        least, greatest, stream = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        with self._current():
            self._call("cuCtxGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(greatest))
            self._call("cuStreamCreateWithPriority", ctypes.byref(stream), _NON_BLOCKING, greatest)
        return stream.value or 0

    def return_stream(self, stream: int) -> None:
        """Takes back a stream that :meth:`new_stream` gave, for its next call; what is on it goes on."""
        _RETURNED_STREAMS.setdefault(self.device, collections.deque()).append(stream)

    def synchronize(self, stream: int) -> None:
        """Waits until what was put on the stream so far has ended."""
        with self._current():
            self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def copy_to_host(self, target: npt.NDArray[np.uint8], address: int, pitch_bytes: int, stream: int) -> None:
        """Queues a copy of rows from the device.

        Args:
            target: C-contiguous ``(rows, width)``; filled when the stream has been synchronised.
            address: of the first row.
            pitch_bytes: from one row to the next.
            stream: to copy on.
        """
        rows, width = target.shape
        copy = _Copy2D(
            src_memory_type=_DEVICE,
            src_device=address,
            src_pitch=pitch_bytes,
            dst_memory_type=_HOST,
            dst_host=target.ctypes.data,
            dst_pitch=width,
            width_bytes=width,
            height=rows,
        )
        with self._current():
            self._call("cuMemcpy2DAsync_v2", ctypes.byref(copy), ctypes.c_void_p(stream))

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Makes the context this thread's, for as long as the body runs."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise CodecError(f"{name} failed with CUDA error {status}")
