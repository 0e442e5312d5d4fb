"""Takes pages out of a pool packed: kernels read the slots, what is left for encoders is in host memory or theirs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sglang_kvcodec.flow.kv_pool import Buffers, PagedKVPool
from sglang_kvcodec.flow.page_codec import PackedPage
from sglang_kvcodec.format.profile import EXACT, Coding
from sglang_kvcodec.format.spec import KVSpec, layer_groups
from sglang_kvcodec.kernels import PagePacks, picture_digests
from sglang_kvcodec.transform import PackedSide, PageTransforms
from sglang_kvcodec.transform.exact import ResidualLayout

BATCH_PAGES = 16
"""Pages of one launch."""
SCRATCH_BYTES = 64 << 20
"""Of the device, for a launch, where a page does not take more by itself."""
_SCRATCH_PER_VALUE_BYTES = 10
"""Of a calibrated tier, which takes most: values and components in fp32, codes and low bits."""
DEVICE_CANVASES_BYTES = 64 << 20
"""Of the device, for pictures that wait for an engine."""


_ALLOCATOR_BYTES = 22 << 20
"""What torch's allocator keeps beyond what is asked for: a block of 20 MiB and one of 2 MiB."""


def pack_buffer_bytes(spec: KVSpec, *, takes_device_canvases: bool) -> int:
    """What packing keeps of the GPU's memory at most; an estimate, without the calibration's tables.

    Args:
        spec: of the pages.
        takes_device_canvases: whether pictures wait on the device for an engine.
    """
    launch_bytes = _values_of_a_page(spec) * _SCRATCH_PER_VALUE_BYTES
    waiting_bytes = DEVICE_CANVASES_BYTES if takes_device_canvases else 0
    return max(SCRATCH_BYTES, launch_bytes) + waiting_bytes + _ALLOCATOR_BYTES


def _values_of_a_page(spec: KVSpec) -> int:
    """Those that one call packs: of one side of the largest layer group."""
    return max(group.layers for group in layer_groups(spec)) * spec.layer_values


class PagePacker:
    """Packs pages of the codings of one server. For one thread at a time; its memory is bounded and used again."""

    def __init__(
        self,
        pool: PagedKVPool,
        transforms: PageTransforms,
        packs: PagePacks,
        coding_of: Callable[[bytes], Coding],
        device_canvases_bytes: int = 0,
    ) -> None:
        """Takes the host memory through which pictures pass: pinned, where the pool is on a GPU.

        Args:
            pool: where pages come from.
            transforms: of the pages and of what the operator asked for.
            packs: what packs them.
            coding_of: how pages of a namespace are coded.
            device_canvases_bytes: pictures are left on the device up to as many bytes, in host memory beyond; more than
                none only for an encoder that takes them there.
        """
        self._pool = pool
        self._transforms = transforms
        self._packs = packs
        self._coding_of = coding_of
        self._groups = layer_groups(pool.spec)
        self._batch_pages = self._pages_of_a_launch()
        self._device_room = _Room(device_canvases_bytes)
        self._staging = torch.empty(0, dtype=torch.uint8)
        for coding in transforms.codings():
            if coding.profile.has_pictures:
                self._stage(*coding, self._batch_pages)

    def packs(self, namespace_digest: bytes) -> bool:
        """Whether pages of a namespace are to be packed; those of a profile without pictures are copied."""
        return self._coding_of(namespace_digest).profile.has_pictures

    def page_bytes(self, namespace_digest: bytes) -> int:
        """What a page of a namespace takes packed, but for escapes, or as it is, whichever is more."""
        spec, pictures = self._pool.spec, len(self._groups) * len(self._pool.spec.sides)
        coding = self._coding_of(namespace_digest)
        if not coding.profile.has_pictures:
            return spec.page_bytes
        rows, width = self._transforms.get(*coding).canvas_shape
        packed = pictures * rows * width
        if coding.calibration_digest or coding.profile_name == EXACT.name:
            rows, width = self._transforms.get(EXACT.name).canvas_shape
            layout = ResidualLayout(spec.dtype)
            stored = sum(layout.stored_bytes(group.layers * spec.layer_values) for group in self._groups)
            packed = max(packed, pictures * rows * width + len(spec.sides) * stored)
        return max(spec.page_bytes, packed)

    def pack(
        self,
        namespace_digest: bytes,
        slots: torch.Tensor,
        after: Sequence[Any],
        only: Sequence[int],
        first_position: int,
    ) -> list[PackedPage]:
        """Packs pages that follow each other; their slots have been read when it returns, or raises.

        Args:
            namespace_digest: of the pages.
            slots: int64 ``(pages * page_tokens,)``, on the pool's device.
            after: device events before which the slots are not read.
            only: indices of the pages of ``slots`` to pack.
            first_position: of the first token of all of ``slots``.

        Returns:
            One for each of ``only``. One whose values a calibrated tier can't code is an ``exact`` one.
        """
        tokens = self._pool.spec.page_tokens
        coding = self._coding_of(namespace_digest)
        packed: list[PackedPage] = []
        with self._pool.reading(after) as buffers:
            pages = slots.view(-1, tokens)[torch.tensor(only, dtype=torch.int64)]
            for start in range(0, len(only), self._batch_pages):
                batch = slice(start, start + self._batch_pages)
                positions = [first_position + index * tokens for index in only[batch]]
                packed += self._pack_batch(coding, pages[batch], positions, buffers)
        return packed

    def _pack_batch(
        self, coding: Coding, slots: torch.Tensor, positions: Sequence[int], buffers: Buffers
    ) -> list[PackedPage]:
        """Slots ``(pages, page_tokens)``. Halves what has a page that can't be coded, until that is found."""
        if not coding.calibration_digest:
            # One page has one coding: what does not depend on the position does not say it.
            positions = [0] * len(positions)
        packed = self._try_batch(*coding, slots, positions, buffers)
        if packed is not None:
            return packed
        if len(positions) == 1:
            exact = self._try_batch(EXACT.name, b"", slots, [0], buffers)
            assert exact is not None, "exact codes whatever there is"
            return exact
        half = len(positions) // 2
        return [
            page
            for part in (slice(None, half), slice(half, None))
            for page in self._pack_batch(coding, slots[part], positions[part], buffers)
        ]

    def _try_batch(
        self,
        profile_name: str,
        calibration_digest: bytes,
        slots: torch.Tensor,
        positions: Sequence[int],
        buffers: Buffers,
    ) -> list[PackedPage] | None:
        rows, width = self._packs.get(profile_name, calibration_digest).canvas_shape
        page_bytes = len(self._groups) * len(self._pool.spec.sides) * rows * width
        is_on_device = self._device_room.take(len(positions) * page_bytes)
        packed: list[PackedPage] | None = None
        try:
            packed = self._pack_sides(profile_name, calibration_digest, slots, positions, buffers, is_on_device)
        finally:
            if packed is None and is_on_device:
                self._device_room.give_back(len(positions) * page_bytes)
        if packed is not None and is_on_device:
            for page in packed:
                # When nobody has it any more: coded, or dropped wherever that was.
                weakref.finalize(page, self._device_room.give_back, page_bytes)
        return packed

    def _pack_sides(
        self,
        profile_name: str,
        calibration_digest: bytes,
        slots: torch.Tensor,
        positions: Sequence[int],
        buffers: Buffers,
        is_on_device: bool,
    ) -> list[PackedPage] | None:
        pack = self._packs.get(profile_name, calibration_digest)
        places = [(group, side) for group in self._groups for side in self._pool.spec.sides]
        device = self._pool.device if is_on_device else "cpu"
        shape = (len(places), *pack.canvas_shape)
        # Each page's are apart, so that each is free when it is coded.
        canvases = [torch.empty(shape, dtype=torch.uint8, device=device) for _ in positions]
        staging = None if is_on_device else self._stage(profile_name, calibration_digest, len(positions))
        sides: list[list[PackedSide]] = [[] for _ in positions]
        for number, (group, side) in enumerate(places):
            layers = buffers[side][group.first_layer : group.first_layer + group.layers]
            made = pack.pack(group, side, positions, slots.reshape(-1), layers, staging)
            if made is None:
                return None
            for own, page_sides, each in zip(canvases, sides, made, strict=True):
                assert each.canvas is not None, "what kernels pack has pictures"
                if is_on_device:
                    own[number].copy_(each.canvas)
                else:
                    np.copyto(own[number].numpy(), each.canvas.numpy())
                page_sides.append(PackedSide(own[number], each.stored, each.escapes, each.steps))
        return [
            PackedPage(profile_name, calibration_digest, *page, picture_digests(page[2]) if is_on_device else None)
            for page in zip(positions, sides, canvases, strict=True)
        ]

    def _stage(self, profile_name: str, calibration_digest: bytes, pages: int) -> torch.Tensor:
        """Canvases ``(pages, rows, width)`` in the staging memory, of which there is more if a coding needs it."""
        shape = (pages, *self._transforms.get(profile_name, calibration_digest).canvas_shape)
        needed = shape[1] * shape[2] * self._batch_pages
        if len(self._staging) < needed:
            self._staging = torch.empty(needed, dtype=torch.uint8, pin_memory=self._pool.device.type == "cuda")
        return self._staging[: shape[0] * shape[1] * shape[2]].view(shape)

    def _pages_of_a_launch(self) -> int:
        page_bytes = _values_of_a_page(self._pool.spec) * _SCRATCH_PER_VALUE_BYTES
        return min(BATCH_PAGES, max(1, SCRATCH_BYTES // page_bytes))


class _Room:
    """Bytes to be had. Thread-safe."""

    def __init__(self, size_bytes: int) -> None:
        self._left = size_bytes
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> bool:
        with self._lock:
            if size_bytes > self._left:
                return False
            self._left -= size_bytes
            return True

    def give_back(self, size_bytes: int) -> None:
        with self._lock:
            self._left += size_bytes
