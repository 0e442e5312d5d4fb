import dataclasses
import json
import math
import struct

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kvcodec.errors import ForeignPageError, FormatError, UnknownFormatError
from sglang_kvcodec.format.calibration import Basis, Calibration, ShardLayout, model_digest
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side
from sglang_kvcodec.testing.calibrations import MODEL_DIGEST, neox_rope, random_calibration

SPEC = KVSpec(layers=5, kv_heads=3, head_dim=8, page_tokens=16, dtype=KVDtype.BFLOAT16)
CALIBRATION = random_calibration(SPEC, rope=neox_rope(8), gain_components=4)


def rewritten(change, data=CALIBRATION.encoded):
    """The artifact with its JSON text and tensors changed."""
    tensors = safetensors.numpy.load(data)
    (size,) = struct.unpack_from("<Q", data)
    fields = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["kvcodec"])
    change(fields, tensors)
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return safetensors.numpy.save(tensors, metadata={"kvcodec": text})


@settings(max_examples=20)
@given(
    layers=st.integers(1, 7),
    per_block=st.sampled_from([1, 3]),
    kept=st.sampled_from([0.01, 0.7, 1.0]),
    sides=st.sampled_from([(Side.KEY, Side.VALUE), (Side.LATENT,)]),
)
def test_what_is_written_is_read_again_and_has_the_same_name(layers, per_block, kept, sides):
    spec = dataclasses.replace(SPEC, layers=layers, sides=sides)
    written = random_calibration(spec, layers_per_block=per_block, kept=kept, gain_components=5)
    read = Calibration.from_bytes(written.encoded, MODEL_DIGEST)
    assert read.digest == written.digest
    assert read.layout == written.layout
    assert read.blocks() == written.blocks()
    for side in sides:
        for basis, other in zip(read.bases[side], written.bases[side], strict=True):
            assert np.array_equal(basis.synthesis, other.synthesis)
            assert np.array_equal(basis.mean, other.mean)
        for model, other in zip(read.gain_models[side], written.gain_models[side], strict=True):
            assert np.array_equal(model.to_array(), other.to_array())
        assert read.tiers["compact"].components(side) == written.tiers["compact"].components(side)


def test_the_name_depends_on_every_number():
    changed = random_calibration(SPEC, rope=neox_rope(8), gain_components=4, step=0.0201)
    assert changed.digest != CALIBRATION.digest
    assert random_calibration(SPEC, rope=neox_rope(8), gain_components=4).digest == CALIBRATION.digest


def test_another_model_or_shard_is_refused():
    with pytest.raises(ForeignPageError):
        Calibration.from_bytes(CALIBRATION.encoded, bytes(32))
    one, other = (ShardLayout(5, 3, 8, tp_rank=rank, tp_size=2) for rank in (0, 1))
    assert model_digest("aa", one) != model_digest("aa", other)
    assert model_digest("aa", one) != model_digest("ab", one)


def _set(name, value):
    return lambda fields, tensors: fields.__setitem__(name, value)


def _set_in(*path):
    *where, value = path

    def change(fields, tensors):
        for name in where[:-1]:
            fields = fields[name]
        fields[where[-1]] = value

    return change


def _tensor(name, value):
    return lambda fields, tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize(
    "change",
    [
        _set("version", 1),
        _set("more", 1),
        _set("model_digest", "aa"),
        _set("model_digest", 5),
        _set("layout", None),
        _set_in("layout", "kv_heads", 4),
        _set_in("layout", "head_dim", 0),
        _set_in("layout", "sides", ["key"]),
        _set_in("layout", "sides", ["key", "query"]),
        _set_in("layout", "tp_rank", 1),
        _set("rope", {}),
        _set_in("rope", "head_dim", 16),
        _set("layers_per_block", 2),
        _set("layers_per_block", 0),
        _set("layers_per_block", 1 << 40),
        _set("layers_per_block", True),
        # Python's json reads and writes these; JSON does not have them.
        _set("notes", {"divergence": math.nan}),
        _set("notes", {"divergence": math.inf}),
        _set("notes", None),
        _set("notes", ["of no", "name"]),
        _set("tiers", {}),
        _set_in("tiers", "exact", {}),
        _set_in("tiers", "high", "rounding", 0.7),
        _set_in("tiers", "high", "rounding", "0.5"),
        _set_in("tiers", "high", "gains", [[16, 0.3]]),
        _set_in("tiers", "high", "gains", [[32, 0.5], [16, 0.5]]),
        _set_in("tiers", "high", "gains", [[4, 2.0**-7]]),
        _set_in("tiers", "high", "gains", [[4, 4.0]]),
        _set_in("tiers", "high", "expected", {"bits": "few"}),
        _set_in("tiers", "high", "steps", {"key": [0.1, 0.1]}),
        _set_in("tiers", "high", "steps", "key", [0.1]),
        _set_in("tiers", "high", "steps", "key", [0.1, 0.0]),
        _set_in("tiers", "high", "steps", "key", [0.1, 1]),
        _tensor("key.0.mean", np.zeros(71, np.float32)),
        _tensor("key.0.mean", np.zeros(72, np.float64)),
        _tensor("key.0.mean", np.full(72, np.nan, np.float32)),
        _tensor("key.0.synthesis", np.zeros((73, 72), np.float16)),
        _tensor("key.0.synthesis", np.zeros((0, 72), np.float16)),
        _tensor("key.0.low_bits.high", np.zeros(73, np.uint8)),
        _tensor("key.0.low_bits.high", np.full(72, 16, np.uint8)),
        _tensor("key.0.low_bits.high", np.zeros(72, np.int8)),
        _tensor("key.0.gain", np.ones(0, np.float32)),
        _tensor("key.0.gain", np.ones(12, np.float32)),
        _tensor("key.0.gain", np.ones((13, 1), np.float32)),
        _tensor("key.0.gain", np.ones(13, np.float64)),
        _tensor("key.0.gain", np.full(13, np.inf, np.float32)),
        _tensor("key.0.gain", np.zeros(13, np.float32)),
        _tensor("key.0.gain", np.ones(1 + 3 * 73, np.float32)),
        _tensor("key.metric", np.zeros((5, 3, 8, 7), np.float32)),
        _tensor("key.9.mean", np.zeros(72, np.float32)),
    ],
)
def test_an_artifact_that_contradicts_itself_is_refused(change):
    with pytest.raises(FormatError):
        Calibration.from_bytes(rewritten(change))


def test_unchanged_rewriting_is_the_same_artifact():
    assert rewritten(lambda fields, tensors: None) == CALIBRATION.encoded


def test_another_way_to_write_the_same_is_refused():
    data = CALIBRATION.encoded
    (size,) = struct.unpack_from("<Q", data)
    spaced = struct.pack("<Q", size + 8) + data[8 : 8 + size] + b" " * 8 + data[8 + size :]
    with pytest.raises(FormatError):
        Calibration.from_bytes(spaced)


@pytest.mark.parametrize("size", [0, 7, 8, 100, len(CALIBRATION.encoded) - 1])
def test_a_truncated_artifact_is_refused(size):
    with pytest.raises(FormatError):
        Calibration.from_bytes(CALIBRATION.encoded[:size])


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_garbage_is_refused(data):
    with pytest.raises(FormatError):
        Calibration.from_bytes(data)


@settings(max_examples=200)
@given(position=st.integers(0, len(CALIBRATION.encoded) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_another_artifact(position, bit):
    """Numbers may change into other numbers: that is why an artifact is asked for by its digest."""
    data = bytearray(CALIBRATION.encoded)
    data[position] ^= 1 << bit
    try:
        other = Calibration.from_bytes(bytes(data))
    except FormatError:
        return
    assert other.digest != CALIBRATION.digest


def test_an_unknown_version_says_so():
    with pytest.raises(UnknownFormatError, match="version 3"):
        Calibration.from_bytes(rewritten(_set("version", 3)))


def test_a_calibration_that_does_not_fit_can_not_be_made():
    bases = {**CALIBRATION.bases, Side.KEY: (Basis(np.zeros(3, np.float32), np.zeros((1, 3), np.float16)),)}
    with pytest.raises(FormatError):
        dataclasses.replace(CALIBRATION, bases=bases)
