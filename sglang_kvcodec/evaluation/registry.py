"""The methods there are, by the names that an operator writes."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.evaluation import cachegen, calibrated_methods, page_methods, quantisers
from sglang_kvcodec.evaluation.methods import Method, MethodContext, MethodFactory

METHODS: dict[str, MethodFactory] = {
    "bf16": quantisers.make_untouched,
    "exact": page_methods.make_profile("exact", "exact"),
    "high": calibrated_methods.make_tier("high"),
    "balanced": calibrated_methods.make_tier("balanced"),
    "compact": calibrated_methods.make_tier("compact"),
    "uncalibrated": page_methods.make_profile("uncalibrated", "high"),
    "fp8": quantisers.make_fp8,
    "fp8-scaled": quantisers.make_fp8_scaled,
    "int8": quantisers.make_int8,
    "int8-x265": quantisers.make_int8_x265,
    "kivi": quantisers.make_kivi,
    "cachegen": cachegen.make_cachegen,
    "lmcache-cachegen": cachegen.make_lmcache_cachegen,
    "zstd": page_methods.make_zstd,
    "lz4": page_methods.make_lz4,
}
"""Name -> what makes it. ``NAME@PARAMETER`` hands it a parameter."""

DEFAULT_METHODS = (
    "bf16",
    "exact",
    "uncalibrated",
    "fp8",
    "fp8-scaled",
    "int8",
    "int8-x265",
    "kivi@4",
    "kivi@2",
    "cachegen@0.125",
    "cachegen@0.25",
    "cachegen@0.5",
    "cachegen@1",
    "lmcache-cachegen@1",
    "lmcache-cachegen@2",
    "lmcache-cachegen@4",
    "zstd@3",
    "lz4",
)
"""What is measured if nothing else is asked for."""


def make_methods(names: Sequence[str], context: MethodContext) -> list[Method]:
    """The methods called ``names``, each once.

    Raises:
        ConfigurationError: one that is unknown, or whose library is missing.
        UnsupportedError: one that can't code such pages.
    """
    methods: list[Method] = []
    for name in dict.fromkeys(names):
        base, _, parameter = name.partition("@")
        if base not in METHODS:
            raise ConfigurationError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
        methods.append(METHODS[base](context, parameter))
    return methods
