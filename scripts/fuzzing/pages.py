"""Page objects: the container alone, and all that a server does with one until values come out.

The first byte of an input says what the rest is, since nothing mutated would get past a CRC:

0. the bytes of an object.
1. u16 manifest size, manifest, payload: under a prefix that fits.
2. the same, and the CRC of each part is set to what the payload has.
3. as 2, and the plane digest of each picture to what a decoder makes of it (values only).
"""

from __future__ import annotations

import functools
import pathlib
import struct
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from fuzzing.target import Target, require
from sglang_kvcodec.errors import CodecError, FormatError
from sglang_kvcodec.format import page_object_pb2 as pb
from sglang_kvcodec.format.digest import bytes_crc32, plane_digest
from sglang_kvcodec.format.namespace import FORMAT_VERSION
from sglang_kvcodec.format.page_object import MAGIC, PREFIX, PageObject, build_page_object, header_bytes
from sglang_kvcodec.format.profile import get_profile
from sglang_kvcodec.format.spec import layer_groups

GOLDEN = pathlib.Path(__file__).parents[2] / "tests" / "golden"
RAW, FRAMED, SEALED, DIGESTED = range(4)
_SIZE = struct.Struct("<H")


def golden_objects() -> list[bytes]:
    """Page objects of every profile, the smallest first."""
    objects = [path.read_bytes() for path in sorted(GOLDEN.glob("**/*.kvpo"))]
    return sorted(objects, key=len)


def opened(data: bytes) -> bytes:
    """Size of the manifest, manifest and payload of an object: what follows a first byte other than 0."""
    size = header_bytes(data)
    return _SIZE.pack(size - PREFIX.size) + data[PREFIX.size :]


def object_of(data: bytes) -> bytes:
    """The page object that an input is."""
    kind, rest = (data[0] % 4, data[1:]) if data else (RAW, b"")
    if kind == RAW or len(rest) < _SIZE.size:
        return rest
    size = _SIZE.unpack_from(rest)[0]
    encoded, payload = rest[_SIZE.size : _SIZE.size + size], rest[_SIZE.size + size :]
    if kind >= SEALED:
        encoded = _with_fitting_sums(encoded, payload, has_digests=kind == DIGESTED)
    return PREFIX.pack(MAGIC, FORMAT_VERSION, 0, len(encoded), bytes_crc32(encoded)) + encoded + payload


def _with_fitting_sums(encoded: bytes, payload: bytes, *, has_digests: bool) -> bytes:
    manifest = pb.Manifest()
    try:
        manifest.ParseFromString(encoded)
    except DecodeError:
        return encoded
    for group in manifest.groups:
        for part in group.parts:
            data = payload[part.offset : part.offset + part.length]
            part.crc32 = bytes_crc32(data)
            if has_digests and part.kind == pb.PART_KIND_PICTURE:
                part.plane_digest = _digest_of(manifest.parameter_sets, data, part.plane_digest)
    return manifest.SerializeToString()


def _digest_of(parameter_sets: bytes, picture: bytes, otherwise: int) -> int:
    try:
        return plane_digest(_decoder().decode(parameter_sets, [picture])[0])
    except (CodecError, FormatError):
        return otherwise


@functools.cache
def _decoder():
    from sglang_kvcodec.video import open_decoder

    return open_decoder("software")


def check_container(data: bytes) -> bool:
    """What is accepted is what would have been written of what was read, to the byte of every part."""
    data = object_of(data)
    try:
        page = PageObject(data)
    except FormatError:
        return False
    header, manifest = page.header, page.header.manifest
    require(len(page) == len(data) == header.object_bytes, "another size than stated")
    groups = [
        {side: page.side_data(group.index, side) for side in header.spec.sides} for group in layer_groups(header.spec)
    ]
    has_pictures = get_profile(header.profile_name, calibrated=bool(header.calibration_digest)).has_pictures
    shape = (manifest.geometry.height * 3 // 2, manifest.geometry.width) if has_pictures else None
    again = build_page_object(
        header.key,
        header.spec,
        header.profile_name,
        groups,
        page.parameter_sets,
        header.calibration_digest,
        header.first_position,
        shape,
    )
    read = PageObject(again, header.key)
    require(read.header.manifest == manifest, "a manifest that nobody writes")
    require(again[read.header.header_bytes :] == data[header.header_bytes :], "a payload that nobody writes")
    return True


def check_values(data: bytes) -> bool:
    """All that a server does with a page: what comes out has the shape that was asked for, or it is refused."""
    data = object_of(data)
    try:
        page = PageObject(data)
    except FormatError:
        return False
    decoder = _group_decoders().get((page.header.spec, page.header.profile_name))
    if decoder is None:
        return False
    spec = page.header.spec
    try:
        for group in layer_groups(spec):
            for side in spec.sides:
                values = decoder.decode([page], group.index, side)
                shape = (1, group.layers, spec.page_tokens, spec.kv_heads, spec.head_dim)
                require(tuple(values.shape) == shape, f"values of shape {tuple(values.shape)}")
    except (FormatError, CodecError):
        return False
    return True


@functools.cache
def _group_decoders():
    """A reader for each layout and profile of the golden pages, with their calibrations."""
    from sglang_kvcodec.flow.page_codec import GroupDecoder
    from sglang_kvcodec.format.calibration import Calibration
    from sglang_kvcodec.transform import PageTransforms

    found = {}
    for path in sorted(GOLDEN.glob("**/*.kvpo")):
        header = PageObject(path.read_bytes()).header
        artifact = path.with_suffix(".safetensors")
        known = [Calibration.from_bytes(artifact.read_bytes())] if artifact.exists() else []
        transforms = PageTransforms(header.spec, header.profile_name, known)
        decoder = _decoder() if transforms.uncalibrated.has_pictures else None
        found[header.spec, header.profile_name] = GroupDecoder(transforms, decoder)
    return found


def _seeds_of(kinds: Sequence[int]) -> list[bytes]:
    objects = golden_objects()
    return [
        bytes([kind]) + (data if kind == RAW else opened(data))
        for kind in kinds
        for data in objects
        if len(data) < 9000
    ]


CONTAINER = Target(
    "page",
    "page objects: container, manifest, parts",
    check_container,
    lambda: _seeds_of((RAW, FRAMED, SEALED)),
)
VALUES = Target(
    "values",
    "page objects up to the values: container, parameter sets, slices, decoder, side bytes, transforms",
    check_values,
    lambda: _seeds_of((RAW, SEALED, DIGESTED)),
)
