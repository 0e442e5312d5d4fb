"""A paged KV pool as the flow sees it: gather pages out of it, write pages into it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from sglang_kvcodec.flow.streams import DeviceStream, stream_of
from sglang_kvcodec.format.spec import KVSpec, Side

Buffers = Mapping[Side, Sequence[torch.Tensor]]

_INTEGER_VIEW = {1: torch.uint8, 2: torch.int16}
"""Rows are moved as integers: index operations on floats of 8 bits don't exist everywhere, and bits stay bits."""


class PagedKVPool:
    """Pages of a pool of shape ``(slots, kv_heads, head_dim)`` per layer and side, on any device.

    Thread-safe as long as no two calls touch the same slots. On a CUDA device each thread works on a stream of its own
    and has finished there when a call returns.
    """

    def __init__(
        self,
        spec: KVSpec,
        buffers: Callable[[], Buffers],
        device: torch.device,
        new_stream: Callable[[torch.device, int], DeviceStream] = stream_of,
    ) -> None:
        """Wraps the pool.

        Args:
            spec: what a page holds.
            buffers: gives the pool's tensors, one per layer; asked at each use since a pool may be resized late.
            device: where the pool lives.
            new_stream: wraps a stream by its handle.
        """
        self.spec = spec
        self.device = device
        self._buffers = buffers
        self._new_stream = new_stream
        self._local = threading.local()
        self._rows = _INTEGER_VIEW[spec.dtype.item_bytes]
        self._dtype: torch.dtype = getattr(torch, spec.dtype.torch_name)

    @contextlib.contextmanager
    def side_stream(self, after: Sequence[Any] = ()) -> Iterator[None]:
        """Runs the body after ``after`` (device events), on a stream of this thread, and waits for it."""
        if self.device.type != "cuda":
            yield
            return
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream = self._local.stream
        for event in after:
            stream.wait_event(event)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            # After an error too: its caller believes that the slots are left alone from now on.
            stream.synchronize()

    def gather(
        self, slots: torch.Tensor, after: Sequence[Any] = (), only: Sequence[int] | None = None
    ) -> dict[Side, torch.Tensor]:
        """Copies pages to host memory.

        Args:
            slots: int64 ``(pages * page_tokens,)``, on the pool's device.
            after: device events the copy has to wait for; the slots are not read before either.
            only: indices of the pages of ``slots`` to copy, all by default.

        Returns:
            Per side ``(pages, layers, page_tokens, kv_heads, head_dim)`` in the pool's dtype, on the CPU.
        """
        spec = self.spec
        pages = slots.numel() // spec.page_tokens if only is None else len(only)
        result: dict[Side, torch.Tensor] = {}
        with self.side_stream(after):
            if only is not None:
                slots = slots.view(-1, spec.page_tokens)[torch.tensor(only, dtype=torch.int64)].reshape(-1)
            for side, layers in self._buffers().items():
                host = torch.empty(
                    (pages, spec.layers, spec.page_tokens, spec.kv_heads, spec.head_dim), dtype=self._rows
                )
                for layer, buffer in enumerate(layers):
                    rows = buffer.view(self._rows).index_select(0, slots)
                    host[:, layer] = rows.view(host[:, layer].shape)
                result[side] = host.view(self._dtype)
        return result

    def stream(self, handle: int) -> DeviceStream:
        """A stream of somebody else on the pool's device, by its handle."""
        return self._new_stream(self.device, handle)

    def layers(self, side: Side, first_layer: int, layers: int) -> Sequence[torch.Tensor]:
        """The tensors ``(slots, kv_heads, head_dim)`` of some layers, for whoever sees to the order of writes."""
        return self._buffers()[side][first_layer : first_layer + layers]

    @contextlib.contextmanager
    def reading(self, after: Sequence[Any] = ()) -> Iterator[Buffers]:
        """Lets the body read the pool's tensors where they lie, on a stream of this thread; it has at the end.

        Args:
            after: device events the body's work on the device waits for.
        """
        with self.side_stream(after):
            yield self._buffers()

    @contextlib.contextmanager
    def writing(
        self, side: Side, first_layer: int, layers: int, after: Sequence[Any] = ()
    ) -> Iterator[Sequence[torch.Tensor]]:
        """Lets the body write to layers of the pool, on a stream of this thread; it has been written at the end.

        Args:
            side: which tensor of the layers.
            first_layer: the first of them.
            layers: how many.
            after: device events the body's work on the device waits for.

        Yields:
            The layers' tensors ``(slots, kv_heads, head_dim)``.
        """
        with self.side_stream(after):
            yield self.layers(side, first_layer, layers)

    def write(self, layers: Sequence[torch.Tensor], values: torch.Tensor, slots: torch.Tensor) -> None:
        """Writes pages to their slots, and nowhere else; inside :meth:`writing`.

        Args:
            layers: what :meth:`writing` gave.
            values: ``(pages, layers, page_tokens, kv_heads, head_dim)`` in the pool's dtype, on any device.
            slots: int64 ``(pages * page_tokens,)``, on the pool's device.
        """
        rows = values.view(self._rows).to(self.device)
        for index, layer in enumerate(layers):
            buffer = layer.view(self._rows)
            buffer.index_copy_(0, slots, rows[:, index].reshape(-1, *buffer.shape[1:]))
