"""Streams of a device, as the restorer needs them: a decoder's, on which what it decoded is checked and restored.

One interface over torch's CUDA streams and over host memory, where all has been done when a call returns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class DeviceEvent(Protocol):
    """A place in a stream's order, as ``torch.cuda.Event``."""

    def query(self) -> bool:
        """Whether all before it has been done."""
        ...

    def synchronize(self) -> None:
        """Waits on the host for all before it."""
        ...


class HostCopy(Protocol):
    """Values on their way to the host."""

    def wait(self) -> torch.Tensor:
        """Waits for what the values are made of and for the copy, not for what was queued later; then gives them."""
        ...


class DeviceStream(Protocol):
    """Does one thing after the other, each in the background."""

    def working(self) -> AbstractContextManager[None]:
        """What torch and Triton start in the body goes on this stream."""
        ...

    def wait_for(self, events: Sequence[Any]) -> None:
        """What is queued from now on begins after the events, which other streams have recorded. The host goes on."""
        ...

    def record(self) -> DeviceEvent:
        """An event after all that is queued so far."""
        ...

    def read(self, values: torch.Tensor) -> HostCopy:
        """Queues a copy to the host of a tensor that this stream writes."""
        ...


class CudaStream:
    """A ``DeviceStream`` whose handle somebody else owns, and keeps for as long as this is used."""

    def __init__(self, device: torch.device, handle: int) -> None:
        self._stream = torch.cuda.ExternalStream(handle, device=device)  # type: ignore[no-untyped-call]

    def working(self) -> AbstractContextManager[None]:
        """See ``DeviceStream.working``."""
        context: AbstractContextManager[None] = torch.cuda.stream(self._stream)
        return context

    def wait_for(self, events: Sequence[Any]) -> None:
        """See ``DeviceStream.wait_for``."""
        for event in events:
            self._stream.wait_event(event)

    def record(self) -> DeviceEvent:
        """See ``DeviceStream.record``."""
        event: DeviceEvent = self._stream.record_event()
        return event

    def read(self, values: torch.Tensor) -> HostCopy:
        """See ``DeviceStream.read``."""
        target = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        with self.working():
            target.copy_(values, non_blocking=True)
        return _CopyBefore(target, self.record())


class _CopyBefore:
    """A copy that is there once an event has come."""

    def __init__(self, target: torch.Tensor, event: DeviceEvent) -> None:
        self._target, self._event = target, event

    def wait(self) -> torch.Tensor:
        self._event.synchronize()
        return self._target


class HostStream:
    """A ``DeviceStream`` of host memory: everything has happened already."""

    def working(self) -> AbstractContextManager[None]:
        """See ``DeviceStream.working``."""
        return contextlib.nullcontext()

    def wait_for(self, events: Sequence[Any]) -> None:
        """See ``DeviceStream.wait_for``."""
        for event in events:
            event.synchronize()

    def record(self) -> DeviceEvent:
        """See ``DeviceStream.record``."""
        return _Happened()

    def read(self, values: torch.Tensor) -> HostCopy:
        """See ``DeviceStream.read``."""
        return _CopyBefore(values.clone(), _Happened())


class _Happened:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def stream_of(device: torch.device, handle: int) -> DeviceStream:
    """The stream with a decoder's handle on the pool's device."""
    return CudaStream(device, handle) if device.type == "cuda" else HostStream()
