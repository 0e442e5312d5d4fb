"""What a forward pass waits for, layer by layer: first on the host that a layer is on its way, then on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter

from sglang_kvcodec.flow.streams import DeviceEvent


class EventLoadCounter(LayerWiseLoadCounter):
    """SGLang's counter, whose layers may come with events after which they are in the pool.

    A pool's accessors call :meth:`wait_until` on the thread that launches the forward pass, with its stream as the
    current one. That thread waits, as with SGLang's own counter, until the layer has been decoded and found sound; it
    can't be spared that, for a stream can't wait for what has not been queued yet. Then the stream waits for the
    restore, and the thread goes on.
    """

    def __init__(self, num_layers: int, current_stream: Callable[[], Any] | None = None) -> None:
        """A counter.

        Args:
            num_layers: of the pool.
            current_stream: the stream that work is being launched on; torch's by default.
        """
        super().__init__(num_layers)
        self._current_stream = current_stream or torch.cuda.current_stream
        self._events: dict[int, list[tuple[int, DeviceEvent]]] = {}
        """Batch -> layers and their events, in the order of the layers."""
        self._waiting: dict[int, dict[int, tuple[Any, int]]] = {}
        """Batch -> by its handle, each stream that waits, and for how many of the events it has been told to."""

    def complete_after(self, index: int, layers: range, events: Sequence[DeviceEvent]) -> None:
        """Layers of batch ``index`` are sound, and in the pool after ``events``; all layers before have been told."""
        self._events.setdefault(index, []).extend((layers[0], event) for event in events)
        for layer in layers:
            self.complete(index, layer)

    def wait_until(self, threshold: int) -> None:
        """Has the current stream wait for layer ``threshold`` and for all before it.

        For all, because a CUDA graph of a whole prefill waits once, for the last layer, and layers are restored on
        several streams.
        """
        super().wait_until(threshold)
        self._queue_waits(self.consumer_index, threshold)

    def finish(self, index: int, forward_stream: Any = None) -> bool:
        """As SGLang's: waits until every layer of batch ``index`` has been told; True if all of them landed.

        Slots that are given back must not be written any more, even if the forward pass did not ask for each layer: all
        that comes next on the streams of the forward pass comes after the restore.

        Args:
            index: of the batch.
            forward_stream: where the next forward pass may run, besides the streams that waited for this one.
        """
        landed = super().finish(index)
        if forward_stream is not None:
            self._queue_waits(index, self.num_layers, forward_stream)
        for stream, _ in list(self._waiting.get(index, {}).values()):
            self._queue_waits(index, self.num_layers, stream)
        self._waiting.pop(index, None)
        self._events.pop(index, None)
        return landed

    def reset(self) -> None:
        """Forgets all batches."""
        super().reset()
        self._events.clear()
        self._waiting.clear()

    def _queue_waits(self, index: int, threshold: int, stream: Any = None) -> None:
        events = self._events.get(index)
        if not events:
            return
        stream = stream or self._current_stream()
        streams = self._waiting.setdefault(index, {})
        _, position = streams.get(stream.cuda_stream, (stream, 0))
        while position < len(events) and events[position][0] <= threshold:
            stream.wait_event(events[position][1])
            position += 1
        streams[stream.cuda_stream] = stream, position
