"""Kernels by the name under which ``kernels/registry.py`` will have them; what is not there yet is said, not skipped.

To plug one in: have the registry offer the name, and fit the call in ``kernel_parts.py`` to its signature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_kvcodec.kernels import registry

RESTORE_CALIBRATED = "open_calibrated_restore"
"""``(transforms, calibration_digest) -> kernel``; called ``kernel.restore(group, side, segment, slots, buffers)``."""
RESTORE_FRAMES = "open_frame_restore"
"""``(profile_name, spec) -> kernel``; called ``kernel.restore_frames(segment, slots, buffers)`` on
the decoder's stream."""
DIGEST = "open_digest"
"""``() -> kernel``; called ``kernel.digests(frames) -> tensor`` on the decoder's stream."""
PACK = "open_pack"
"""``(profile_name, spec) -> kernel``; called ``kernel.pack(buffers, slots) -> canvases``."""


class NotThereError(Exception):
    """A kernel that has not been built yet."""


def opener(name: str) -> Callable[..., Any]:
    """What opens a kernel.

    Raises:
        NotThereError: the registry does not have it.
    """
    found = getattr(registry, name, None)
    if found is None:
        raise NotThereError(f"kernels/registry.py has no {name}")
    return found
