"""Profiles: the quality tiers, each a fixed chain of named stages."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from sglang_kvcodec.errors import UnknownFormatError, UnsupportedError
from sglang_kvcodec.format.spec import KVDtype

HEVC_STAGE = "hevc-lossless/1"


@dataclasses.dataclass(frozen=True)
class Profile:
    """A quality tier.

    Attributes:
        name: what the operator writes.
        stages: in order of encoding, ``name/version``; a reader refuses a chain it does not know.
        promise: what the restored KV is worth, in words.
        dtypes: the pools it can code.
        is_calibrated: whether it needs a calibration of the model.
    """

    name: str
    stages: tuple[str, ...]
    promise: str
    dtypes: frozenset[KVDtype] = frozenset(KVDtype)
    is_calibrated: bool = False

    @property
    def has_pictures(self) -> bool:
        """Whether its page objects hold pictures."""
        return HEVC_STAGE in self.stages


class Coding(NamedTuple):
    """How pages of a namespace are coded: the name of their profile, and the digest of their calibration or nothing."""

    profile_name: str
    calibration_digest: bytes = b""

    @property
    def profile(self) -> Profile:
        """The profile, as it is with or without a calibration."""
        return get_profile(self.profile_name, calibrated=bool(self.calibration_digest))


RAW = Profile("raw", ("raw/1",), "bit-exact, not coded: the baseline")
EXACT = Profile("exact", ("exponent-split/1", "nv12-canvas/1", HEVC_STAGE), "bit-exact pool contents")
HIGH = Profile(
    "high",
    ("uniform-step/1", "nv12-canvas/1", HEVC_STAGE),
    "lossless of the 8-bit values; their noise power is at most 1e-3 of the signal's, that of an FP8 cache",
    frozenset({KVDtype.BFLOAT16, KVDtype.FLOAT16}),
)

_CALIBRATED_STAGES = ("rope/1", "klt/1", "token-gain/1", "component-canvas/1", HEVC_STAGE)

_UNCALIBRATED = {profile.name: profile for profile in (RAW, EXACT, HIGH)}
_CALIBRATED = {
    name: Profile(name, _CALIBRATED_STAGES, promise, is_calibrated=True)
    for name, promise in {
        "high": "disturbs the model's output no more than an FP8 (e4m3) KV cache, on the calibration's text",
        "balanced": "no more than a good 4-bit KV cache (KIVI), on the calibration's text",
        "compact": "the smallest that stays usable",
    }.items()
}
CALIBRATED_TIERS = tuple(_CALIBRATED)
"""The tiers that a calibration can have, from the finest to the coarsest."""
PROFILE_NAMES = (RAW.name, EXACT.name, *CALIBRATED_TIERS)
"""What an operator can ask for."""


def get_profile(name: str, calibrated: bool = False) -> Profile:
    """The profile called ``name``, as it is with or without a calibration.

    Raises:
        UnknownFormatError: there is none.
    """
    profiles = _CALIBRATED if calibrated else _UNCALIBRATED
    try:
        return profiles[name]
    except KeyError:
        kind = "calibrated" if calibrated else "uncalibrated"
        raise UnknownFormatError(f"unknown {kind} profile {name!r}; there are {', '.join(profiles)}") from None


def without_calibration(name: str, dtype: KVDtype) -> Profile:
    """What a pool is coded with where ``name`` was asked for and there is no calibration: the finest there is without.

    Raises:
        UnknownFormatError: there is no such profile at all.
    """
    if name not in PROFILE_NAMES:
        raise UnknownFormatError(f"unknown profile {name!r}; there are {', '.join(PROFILE_NAMES)}")
    if name not in CALIBRATED_TIERS:
        return get_profile(name)
    return HIGH if dtype in HIGH.dtypes else EXACT


def check_supported(profile: Profile, dtype: KVDtype) -> None:
    """Refuses a pool that ``profile`` can't code.

    Raises:
        UnsupportedError: with what to choose instead.
    """
    if dtype not in profile.dtypes:
        raise UnsupportedError(f"profile {profile.name!r} can't code a {dtype.torch_name} KV cache; use 'exact'")
