"""Profiles: the quality tiers, each a fixed chain of named stages."""

from __future__ import annotations

import dataclasses

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
    """

    name: str
    stages: tuple[str, ...]
    promise: str
    dtypes: frozenset[KVDtype] = frozenset(KVDtype)

    @property
    def has_pictures(self) -> bool:
        """Whether its page objects hold pictures."""
        return HEVC_STAGE in self.stages


RAW = Profile("raw", ("raw/1",), "bit-exact, not coded: the baseline")
EXACT = Profile("exact", ("exponent-split/1", "nv12-canvas/1", HEVC_STAGE), "bit-exact pool contents")
HIGH = Profile(
    "high",
    ("uniform-step/1", "nv12-canvas/1", HEVC_STAGE),
    "lossless of the 8-bit values; their noise power is at most 1e-3 of the signal's, that of an FP8 cache",
    frozenset({KVDtype.BFLOAT16, KVDtype.FLOAT16}),
)

_BY_NAME = {profile.name: profile for profile in (RAW, EXACT, HIGH)}


def get_profile(name: str) -> Profile:
    """The profile called ``name``.

    Raises:
        UnknownFormatError: there is none.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        raise UnknownFormatError(f"unknown profile {name!r}; there are {', '.join(_BY_NAME)}") from None


def check_supported(profile: Profile, dtype: KVDtype) -> None:
    """Refuses a pool that ``profile`` can't code.

    Raises:
        UnsupportedError: with what to choose instead.
    """
    if dtype not in profile.dtypes:
        raise UnsupportedError(f"profile {profile.name!r} can't code a {dtype.torch_name} KV cache; use 'exact'")
