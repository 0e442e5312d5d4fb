"""Tables of cos and sin on a device, shared by all threads that turn the same pages.

A segment of pages is restored part by part, a layer group each, on several threads, and all parts have its positions.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from typing import Any

import torch

from sglang_kvcodec.format.rope import RopeSpec
from sglang_kvcodec.kernels.upload import upload
from sglang_kvcodec.transform.rope import rotation_tables

_KEPT_TABLES = 8
"""Segments that are restored at the same time, roughly; 1 MiB each for 32 pages of 64 tokens, 128 dimensions."""


class Turns:
    """The tables of one rotation. Thread-safe."""

    def __init__(self, rope: RopeSpec, page_tokens: int, device: torch.device) -> None:
        self._rope = rope
        self._page_tokens = page_tokens
        self._device = device
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor, Any]]
        self._kept = collections.OrderedDict()

    def get(self, first_positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin, fp32 ``(pages * page_tokens, rotary pairs)`` each, for work on the current stream.

        Raises:
            ValueError: a negative position; the caller's mistake.
        """
        key = tuple(first_positions)
        with self._lock:
            found = self._kept.pop(key, None)
            if found is None:
                tables = rotation_tables(key, self._page_tokens, self._rope)
                cos, sin = (upload(half, self._device) for half in tables)
                is_cuda = self._device.type == "cuda"
                there = torch.cuda.current_stream(self._device).record_event() if is_cuda else None
                found = cos, sin, there
            self._kept[key] = found
            while len(self._kept) > _KEPT_TABLES:
                self._kept.popitem(last=False)
        cos, sin, there = found
        if there is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(there)
            for half in (cos, sin):
                # Another thread may let it go while this stream still has to read it.
                half.record_stream(stream)
        return cos, sin
