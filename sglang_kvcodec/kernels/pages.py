"""The restore kernels that a server can need, by what pages say of themselves: ``PageTransforms`` of the GPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sglang_kvcodec.errors import ForeignPageError
from sglang_kvcodec.format.spec import KVSpec, LayerGroup, Side
from sglang_kvcodec.kernels.base import KernelRestore, PageRestore
from sglang_kvcodec.kernels.registry import open_calibrated_restore, open_restore
from sglang_kvcodec.transform import PackedSide, PageTransforms

if TYPE_CHECKING:
    # Needs Triton.
    from sglang_kvcodec.kernels.planes import Planes


class UncalibratedRestore:
    """A kernel for which every layer group, side and position is the same."""

    def __init__(self, kernel: KernelRestore) -> None:
        self._kernel = kernel

    def restore(
        self,
        group: LayerGroup,
        side: Side,
        packed: Sequence[PackedSide],
        first_positions: Sequence[int],
        slots: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        planes: Planes | None = None,
    ) -> None:
        """See ``PageRestore.restore``."""
        self._kernel.restore(packed, slots, buffers, planes)


class PageRestores:
    """Kernels for pages of any coding that ``PageTransforms`` knows, opened when first asked for. Thread-safe."""

    def __init__(self, transforms: PageTransforms, device: torch.device | str) -> None:
        """Opens nothing yet.

        Args:
            transforms: know the calibrations, those that come late as well.
            device: of the pool.
        """
        self._transforms = transforms
        self._device = torch.device(device)
        self._lock = threading.Lock()
        self._kernels: dict[tuple[str, bytes], PageRestore] = {}

    @property
    def spec(self) -> KVSpec:
        """Of the pages."""
        return self._transforms.spec

    def get(self, profile_name: str, calibration_digest: bytes = b"") -> PageRestore:
        """The kernel for pages that say so of themselves. What opens a calibrated one waits for its tables.

        Raises:
            ForeignPageError: pages that can't be restored here, or of a profile without a kernel.
            ConfigurationError: there is no Triton.
        """
        with self._lock:
            kernel = self._kernels.get((profile_name, calibration_digest))
            if kernel is None:
                kernel = self._open(profile_name, calibration_digest)
                self._kernels[profile_name, calibration_digest] = kernel
            return kernel

    def _open(self, profile_name: str, calibration_digest: bytes) -> PageRestore:
        self._transforms.get(profile_name, calibration_digest)
        if not calibration_digest:
            plain = open_restore(profile_name, self.spec)
            if plain is None:
                raise ForeignPageError(f"pages of profile {profile_name!r} have no kernel")
            return UncalibratedRestore(plain)
        calibration = self._transforms.calibration(calibration_digest)
        kernel = open_calibrated_restore(self.spec, calibration, profile_name, self._device)
        if self._device.type == "cuda":
            # The tables were copied on this thread's stream; others will read them on theirs.
            torch.cuda.synchronize(self._device)
        return kernel
