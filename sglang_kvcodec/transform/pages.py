"""One interface over all profiles, calibrated or not: sides of layer groups of pages, packed and restored."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch

from sglang_kvcodec.errors import ForeignPageError
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.page_object import PageHeader
from sglang_kvcodec.format.profile import CALIBRATED_TIERS, EXACT, Coding, Profile, without_calibration
from sglang_kvcodec.format.spec import KVSpec, LayerGroup, Side, picture_geometry
from sglang_kvcodec.transform.base import PackedSide
from sglang_kvcodec.transform.klt import KltTransform
from sglang_kvcodec.transform.registry import get_transform


class PageTransform(Protocol):
    """Packs and restores pages of one spec under one profile and, maybe, calibration. Thread-safe."""

    @property
    def canvas_shape(self) -> tuple[int, int]:
        """Shape of the uint8 NV12 canvases, of a profile with pictures."""
        ...

    def pack(
        self, group: LayerGroup, side: Side, values: torch.Tensor, first_positions: Sequence[int]
    ) -> list[PackedSide] | None:
        """See ``KltTransform.pack``."""
        ...

    def restore(
        self, group: LayerGroup, side: Side, packed: Sequence[PackedSide], first_positions: Sequence[int]
    ) -> torch.Tensor:
        """See ``KltTransform.restore``."""
        ...


class _Uncalibrated:
    """A transform for which every layer, side and position is the same."""

    def __init__(self, profile: Profile, spec: KVSpec) -> None:
        self._transform = get_transform(profile.name, spec)
        self.canvas_shape = picture_geometry(spec).canvas_shape

    def pack(
        self, group: LayerGroup, side: Side, values: torch.Tensor, first_positions: Sequence[int]
    ) -> list[PackedSide] | None:
        return self._transform.pack(values)

    def restore(
        self, group: LayerGroup, side: Side, packed: Sequence[PackedSide], first_positions: Sequence[int]
    ) -> torch.Tensor:
        return self._transform.restore(group.layers, packed)


class PageTransforms:
    """The transforms that a server which was asked for some tiers can need. Thread-safe; calibrations may come late.

    Pages of a tier may be coded with one of the calibrations that are known, without any, or, where a calibrated tier
    can't code their values, as ``exact``.
    """

    def __init__(
        self,
        spec: KVSpec,
        tiers: str | Sequence[str],
        calibrations: Sequence[Calibration] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        """Makes the transforms that need no calibration, and those of the calibrations.

        Args:
            spec: of the pages.
            tiers: what the operator asked for: a profile's name, or those of several, the best first.
            calibrations: of the model.
            device: where calibrated pages are packed and restored.

        Raises:
            UnknownFormatError: there is no such profile.
            UnsupportedError: it can't code such a pool.
            ForeignPageError: a calibration of another shape.
        """
        self.spec = spec
        self.tiers: tuple[str, ...] = (tiers,) if isinstance(tiers, str) else tuple(tiers)
        self._device = torch.device(device)
        self._lock = threading.Lock()
        self._calibrations: dict[bytes, Calibration] = {}
        self._transforms: dict[tuple[str, bytes], PageTransform] = {
            (coding.profile_name, b""): _Uncalibrated(coding.profile, spec) for coding in self.codings()
        }
        for calibration in calibrations:
            self.add(calibration)

    def add(self, calibration: Calibration) -> None:
        """Learns a calibration.

        Raises:
            ForeignPageError: it is of another shape, or has not the tier; nothing has changed.
        """
        transforms = {
            tier: KltTransform(self.spec, calibration, tier, self._device)
            for tier in self.tiers
            if tier in CALIBRATED_TIERS
        }
        exact = _Uncalibrated(EXACT, self.spec)
        if self._device.type == "cuda":
            # The bases were made on this thread's stream; others will read them on theirs.
            torch.cuda.synchronize(self._device)
        with self._lock:
            self._transforms.setdefault((EXACT.name, b""), exact)
            for tier, transform in transforms.items():
                self._transforms[tier, calibration.digest] = transform
            self._calibrations[calibration.digest] = calibration

    def calibration(self, digest: bytes) -> Calibration:
        """A calibration that is known.

        Raises:
            ForeignPageError: it is not.
        """
        with self._lock:
            if digest not in self._calibrations:
                raise ForeignPageError(f"an unknown calibration {digest.hex()[:16]}")
            return self._calibrations[digest]

    def get(self, profile_name: str, calibration_digest: bytes = b"") -> PageTransform:
        """The transform of pages that say so of themselves.

        Raises:
            ForeignPageError: another profile than asked for, or an unknown calibration.
        """
        with self._lock:
            transform = self._transforms.get((profile_name, calibration_digest))
        if transform is None:
            needed = f" with calibration {calibration_digest.hex()[:16]}" if calibration_digest else ""
            raise ForeignPageError(f"a page of profile {profile_name!r}{needed} where {','.join(self.tiers)!r} is read")
        return transform

    def check(self, header: PageHeader) -> None:
        """Refuses a page that can't be restored here.

        Raises:
            ForeignPageError: see :meth:`get`; also a page of another layout.
        """
        if header.spec != self.spec:
            raise ForeignPageError(f"page {header.key} is of {header.spec}")
        self.get(header.profile_name, header.calibration_digest)

    def coding(self, tier: str, calibration_digest: bytes = b"") -> Coding:
        """What new pages of a tier are coded with, given the calibration to use."""
        if calibration_digest and tier in CALIBRATED_TIERS:
            return Coding(tier, calibration_digest)
        return Coding(without_calibration(tier, self.spec.dtype).name)

    def codings(self, calibration_digest: bytes = b"") -> tuple[Coding, ...]:
        """What new pages are coded with, the best tier first. Without a calibration several tiers may share one."""
        return tuple(dict.fromkeys(self.coding(tier, calibration_digest) for tier in self.tiers))

    @property
    def uncalibrated(self) -> Profile:
        """What pages of the best tier are coded with without a calibration."""
        return self.coding(self.tiers[0]).profile

    @property
    def have_pictures(self) -> bool:
        """Whether pages of any of the tiers have pictures."""
        return any(coding.profile.has_pictures for coding in self.codings())
