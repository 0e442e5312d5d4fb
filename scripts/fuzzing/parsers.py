"""All parsers that are fuzzed. What they are of is imported when one is loaded, so that atheris can be there first."""

from __future__ import annotations

import importlib

from fuzzing.target import Target

_FORMAT = "sglang_kvcodec.format"
MODULES_OF = {
    "page": (_FORMAT,),
    "values": (_FORMAT, "sglang_kvcodec.transform", "sglang_kvcodec.video", "sglang_kvcodec.flow.page_codec"),
    "calibration": (_FORMAT, "sglang_kvcodec.transform.klt"),
    "archive": (_FORMAT,),
    "wire": (_FORMAT, "sglang_kvcodec.rpc", "sglang_kvcodec.flow.receiver", "sglang_kvcodec.flow.arriving_page"),
}
"""Target -> the modules whose coverage guides it."""
_WHERE = {
    "page": ("pages", "CONTAINER"),
    "values": ("pages", "VALUES"),
    "calibration": ("calibrations", "TARGET"),
    "archive": ("archives", "TARGET"),
    "wire": ("wire", "TARGET"),
}


def load(name: str) -> Target:
    """The target of that name."""
    module, attribute = _WHERE[name]
    target: Target = getattr(importlib.import_module(f"fuzzing.{module}"), attribute)
    return target
