import dataclasses

import pytest

from sglang_kvcodec.format.namespace import Namespace, PageKey
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side

BASE = Namespace(
    weights_digest="aa",
    config_digest="bb",
    rope='{"theta":10000}',
    spec=KVSpec(6, 2, 128, 64, KVDtype.BFLOAT16),
    first_layer=0,
    tp_rank=0,
    tp_size=1,
    pp_rank=0,
    pp_size=1,
    page_hash_scheme="sglang-sha256-chain",
    adapters_digest="",
    profile="exact",
    stages=("exponent-split/1", "nv12-canvas/1", "hevc-lossless/1"),
)

CHANGES = {
    "weights_digest": "ab",
    "config_digest": "ba",
    "rope": '{"theta":10001}',
    "spec": dataclasses.replace(BASE.spec, layers=7),
    "first_layer": 1,
    "tp_rank": 1,
    "tp_size": 2,
    "pp_rank": 1,
    "pp_size": 2,
    "page_hash_scheme": "other",
    "adapters_digest": "dd",
    "profile": "high",
    "stages": ("exponent-split/2", "nv12-canvas/1", "hevc-lossless/1"),
    "calibration_digest": "cc",
    "format_version": 2,
}

SPEC_CHANGES = {
    "layers": 7,
    "kv_heads": 4,
    "head_dim": 64,
    "page_tokens": 32,
    "dtype": KVDtype.FLOAT16,
    "sides": (Side.KEY,),
}


def test_every_field_is_tried():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(Namespace)}
    assert set(SPEC_CHANGES) == {field.name for field in dataclasses.fields(KVSpec)}


def test_the_digest_changes_with_every_field():
    others = [dataclasses.replace(BASE, **{name: value}) for name, value in CHANGES.items()]
    others += [
        dataclasses.replace(BASE, spec=dataclasses.replace(BASE.spec, **{name: value}))
        for name, value in SPEC_CHANGES.items()
        if name != "layers"
    ]
    digests = {namespace.digest for namespace in [BASE, *others]}
    assert len(digests) == 1 + len(others)


def test_the_digest_never_changes_by_itself():
    expected = "ff0f12c6182541a14835e25d719c76b28ee7f3cf07798de4beaf216e48a7598a"
    assert BASE.digest.hex() == expected
    assert dataclasses.replace(BASE).digest == BASE.digest


def test_a_page_key_is_64_bytes():
    key = PageKey(BASE.digest, bytes(range(32)))
    assert key.to_bytes() == BASE.digest + bytes(range(32))
    assert PageKey.from_bytes(key.to_bytes()) == key


@pytest.mark.parametrize("size", [0, 63, 65])
def test_a_page_key_of_another_size_is_refused(size):
    with pytest.raises(ValueError, match="page key"):
        PageKey.from_bytes(bytes(size))
