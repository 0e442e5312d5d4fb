"""What packs pages where they lie in a pool, by the coding they are to have: the write side of ``PageRestores``."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.format.profile import EXACT, HIGH
from sglang_kvcodec.format.spec import KVSpec, LayerGroup, Side
from sglang_kvcodec.kernels.base import PagePack, PageRestore
from sglang_kvcodec.kernels.pool_layers import check_readable_slots, writable_layers
from sglang_kvcodec.transform import PackedSide, PageTransform, PageTransforms
from sglang_kvcodec.transform.floats import from_bits


class ReferencePack:
    """A ``PagePack`` without a kernel: slots are gathered by torch, on their device, and the transform does the rest.

    For profiles that are a plain copy, and to compare kernels with.
    """

    def __init__(self, spec: KVSpec, transform: PageTransform) -> None:
        self._spec = spec
        self._transform = transform

    @property
    def canvas_shape(self) -> tuple[int, int]:
        """Shape of the uint8 NV12 canvases."""
        return self._transform.canvas_shape

    def pack(
        self,
        group: LayerGroup,
        side: Side,
        first_positions: Sequence[int],
        slots: torch.Tensor,
        buffers: Sequence[torch.Tensor],
        canvases: torch.Tensor | None = None,
    ) -> list[PackedSide] | None:
        """See ``PagePack.pack``."""
        spec, pages = self._spec, len(first_positions)
        layers = writable_layers(spec, buffers)
        if len(layers) != group.layers:
            raise ValueError(f"expected {group.layers} layers, got {len(layers)}")
        check_readable_slots(slots, pages, spec, layers[0])
        rows = torch.stack([layer.index_select(0, slots).view(pages, spec.page_tokens, -1) for layer in layers], dim=1)
        shape = (pages, group.layers, spec.page_tokens, spec.kv_heads, spec.head_dim)
        packed = self._transform.pack(group, side, from_bits(rows, spec.dtype).view(shape), first_positions)
        if packed is None or canvases is None:
            return packed
        made = torch.stack([page.canvas for page in packed if page.canvas is not None])
        if canvases.dtype != torch.uint8 or canvases.shape != made.shape:
            raise ValueError(f"expected uint8 canvases {tuple(made.shape)}, got {canvases.dtype} {canvases.shape}")
        canvases.copy_(made)
        if canvases.device.type == "cuda":
            torch.cuda.current_stream(canvases.device).synchronize()
        return [
            PackedSide(canvas, page.stored, page.escapes, page.steps)
            for canvas, page in zip(canvases, packed, strict=True)
        ]


class PagePacks:
    """Packs of any coding that ``PageTransforms`` knows, opened when first asked for. Thread-safe."""

    def __init__(self, transforms: PageTransforms, device: torch.device | str, *, use_kernels: bool = True) -> None:
        """Opens nothing yet.

        Args:
            transforms: know the calibrations, those that come late as well.
            device: of the pool.
            use_kernels: False to pack with the transforms whatever there is a kernel for.
        """
        self._transforms = transforms
        self._device = torch.device(device)
        self._use_kernels = use_kernels
        self._lock = threading.Lock()
        self._packs: dict[tuple[str, bytes], PagePack] = {}

    def get(self, profile_name: str, calibration_digest: bytes = b"", like: PageRestore | None = None) -> PagePack:
        """What packs pages of a coding. What opens a calibrated one waits for its tables.

        Args:
            profile_name: of the coding.
            calibration_digest: of its calibration; empty for none.
            like: the kernel that restores such pages, whose tables on the device can be shared.

        Raises:
            ForeignPageError: a coding that ``transforms`` does not know.
            ConfigurationError: there is no Triton.
        """
        key = profile_name, calibration_digest
        with self._lock:
            if key not in self._packs:
                self._packs[key] = self._open(profile_name, calibration_digest, like)
            return self._packs[key]

    def _open(self, profile_name: str, calibration_digest: bytes, like: PageRestore | None) -> PagePack:
        spec, transform = self._transforms.spec, self._transforms.get(profile_name, calibration_digest)
        has_kernel = bool(calibration_digest) or profile_name in (EXACT.name, HIGH.name)
        if not (self._use_kernels and has_kernel):
            return ReferencePack(spec, transform)
        try:
            from sglang_kvcodec.kernels.exact_pack import ExactPack
            from sglang_kvcodec.kernels.high_pack import HighPack
            from sglang_kvcodec.kernels.klt import KltRestore
            from sglang_kvcodec.kernels.klt_pack import KltPack
        except ImportError as error:
            raise ConfigurationError(f"profile {profile_name!r} needs Triton to pack on a GPU: {error}") from error
        if profile_name == EXACT.name:
            return ExactPack(spec)
        pack: PagePack
        if calibration_digest:
            calibration = self._transforms.calibration(calibration_digest)
            bases = like.bases if isinstance(like, KltRestore) else None
            pack = KltPack(spec, calibration, profile_name, self._device, bases)
        else:
            pack = HighPack(spec, self._device)
        if self._device.type == "cuda":
            # The tables were copied on this thread's stream; others will read them on theirs.
            torch.cuda.synchronize(self._device)
        return pack
