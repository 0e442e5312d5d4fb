"""Profiles by name."""

from __future__ import annotations

from collections.abc import Callable

from sglang_kvcodec.format.profile import EXACT, HIGH, RAW, check_supported, get_profile
from sglang_kvcodec.format.spec import KVSpec, picture_geometry
from sglang_kvcodec.transform.base import Transform
from sglang_kvcodec.transform.exact import ExactTransform
from sglang_kvcodec.transform.high import HighTransform
from sglang_kvcodec.transform.raw import RawTransform

_TRANSFORMS: dict[str, Callable[[KVSpec], Transform]] = {
    RAW.name: RawTransform,
    EXACT.name: ExactTransform,
    HIGH.name: HighTransform,
}


def get_transform(profile_name: str, spec: KVSpec) -> Transform:
    """The transform of a profile for pages of ``spec``.

    Raises:
        UnknownFormatError: there is no such profile.
        UnsupportedError: it can't code this pool.
    """
    profile = get_profile(profile_name)
    check_supported(profile, spec.dtype)
    picture_geometry(spec)
    return _TRANSFORMS[profile.name](spec)
