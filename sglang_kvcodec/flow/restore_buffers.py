"""GPU memory that restoring takes beside the decoders: torch keeps it for each decoder's stream."""

from __future__ import annotations

from sglang_kvcodec.format.spec import KVSpec, layer_groups

_CODE_BYTES = 2.25
"""For each value of a calibrated segment: codes in fp16, of some components in two columns, padded to whole blocks."""
_SIDE_BYTES = 1.25
"""For each value: stored bytes at most, and what is a small part of them: steps, escapes, turns, addresses."""
_CANVAS_BYTES = 1
"""For each value, where canvases come from the host."""
_LARGE_BYTES, _BLOCK_BYTES, _SMALL_BYTES = 10 << 20, 20 << 20, 2 << 20
"""torch's caching allocator: tensors up to 10 MiB share blocks of 20 MiB, larger ones have whole MiB of their own,
tensors below 1 MiB share blocks of 2 MiB (``c10/core/AllocatorConfig.h``)."""


def restore_buffer_bytes(spec: KVSpec, pages: int, *, from_host: bool) -> int:
    """What one thread's restores keep of the GPU's memory at most; an estimate.

    Args:
        spec: of the pages.
        pages: of a segment.
        from_host: whether canvases are sent to the GPU rather than decoded there.
    """
    values = pages * spec.layer_values * max(group.layers for group in layer_groups(spec))
    sizes = [values * _CODE_BYTES, values * _SIDE_BYTES, *([values * _CANVAS_BYTES] if from_host else [])]
    large = [size for size in sizes if size > _LARGE_BYTES]
    blocks = -(-int(sum(size for size in sizes if size <= _LARGE_BYTES)) // _BLOCK_BYTES)
    rounded = sum(-(-int(size) // _SMALL_BYTES) * _SMALL_BYTES for size in large)
    return rounded + max(1, blocks) * _BLOCK_BYTES + _SMALL_BYTES
