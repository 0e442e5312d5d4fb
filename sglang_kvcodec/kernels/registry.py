"""Restore kernels by the name of their profile."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.profile import EXACT, HIGH, check_supported, get_profile
from sglang_kvcodec.format.spec import KVSpec
from sglang_kvcodec.kernels.base import KernelRestore, PageRestore


def open_restore(profile_name: str, spec: KVSpec) -> KernelRestore | None:
    """The restore kernel of a profile for pages of ``spec``; None for a profile that is a plain copy.

    Raises:
        UnknownFormatError: there is no such profile.
        UnsupportedError: it can't code this pool.
        ConfigurationError: there is no Triton to compile the kernel with.
    """
    profile = get_profile(profile_name)
    check_supported(profile, spec.dtype)
    if not profile.has_pictures:
        return None
    try:
        from sglang_kvcodec.kernels.restore import ExactRestore, HighRestore
    except ImportError as error:
        raise ConfigurationError(f"profile {profile.name!r} needs Triton to restore on a GPU: {error}") from error
    restores: dict[str, Callable[[KVSpec], KernelRestore]] = {EXACT.name: ExactRestore, HIGH.name: HighRestore}
    return restores[profile.name](spec)


def open_calibrated_restore(
    spec: KVSpec, calibration: Calibration, tier: str, device: torch.device | str
) -> PageRestore:
    """The restore kernel of one tier of one calibration, its tables on the device.

    Args:
        spec: of the pages.
        calibration: one that ``KltTransform`` takes for them.
        tier: one of its tiers.
        device: of the pool.

    Raises:
        ConfigurationError: there is no Triton to compile the kernel with.
    """
    try:
        from sglang_kvcodec.kernels.klt import KltRestore
    except ImportError as error:
        raise ConfigurationError(f"tier {tier!r} needs Triton to restore on a GPU: {error}") from error
    return KltRestore(spec, calibration, tier, device)


def picture_digests(canvases: torch.Tensor) -> list[int]:
    """``plane_digest`` of pictures where they lie; waits for the current stream of their device.

    Args:
        canvases: uint8 ``(pictures, height * 3 // 2, width)``, contiguous.
    """
    from sglang_kvcodec.kernels.digest import plane_digests
    from sglang_kvcodec.kernels.planes import planes_of

    _, rows, width = canvases.shape
    found = plane_digests(planes_of(canvases), width, rows * 2 // 3)
    return [int(digest) for digest in found.cpu().numpy().view(np.uint64)]
