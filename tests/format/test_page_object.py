import dataclasses
import hashlib
import struct

import hypothesis
import pytest
from hypothesis import strategies as st

from sglang_kvcodec.config import MAX_OBJECT_BYTES
from sglang_kvcodec.errors import (
    ChecksumError,
    ForeignPageError,
    FormatError,
    TruncatedError,
    UnknownFormatError,
)
from sglang_kvcodec.format import page_object
from sglang_kvcodec.format import page_object_pb2 as pb
from sglang_kvcodec.format.digest import bytes_crc32
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import (
    MAGIC,
    PREFIX,
    PageObject,
    PicturePart,
    SideData,
    build_page_object,
    header_bytes,
    read_header,
)
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups

KEY = PageKey(hashlib.sha256(b"namespace").digest(), hashlib.sha256(b"page").digest())
OTHER = hashlib.sha256(b"other").digest()
SPEC = KVSpec(7, 2, 128, 64, KVDtype.BFLOAT16)


def part(name, size):
    return (hashlib.sha256(name.encode()).digest() * (size // 32 + 1))[:size]


def groups_of(spec, profile):
    """Parts of different sizes for each group and side, as the profile has them."""
    groups = []
    for group in layer_groups(spec):
        sides = {}
        for number, side in enumerate(spec.sides):
            name = f"{group.index} {side.value}"
            picture = PicturePart(part("p" + name, 40 + group.index), 7 + number, (0.5,) * group.layers)
            sides[side] = {
                "raw": SideData(stored=part("s" + name, 50 + number)),
                "exact": SideData(dataclasses.replace(picture, steps=()), part("s" + name, 50 + number)),
                "high": SideData(picture, escapes=part("e" + name, 9) if group.index == 1 else b""),
            }[profile]
        groups.append(sides)
    return groups


def built(spec=SPEC, profile="exact"):
    return build_page_object(KEY, spec, profile, groups_of(spec, profile), b"" if profile == "raw" else b"parameters")


def with_manifest(data, change, version=1):
    """The object with a changed manifest, its size and CRC in order."""
    start = header_bytes(data[: PREFIX.size])
    manifest = pb.Manifest.FromString(data[PREFIX.size : start])
    change(manifest)
    return with_header(manifest.SerializeToString(deterministic=True), data[start:], version)


def with_header(encoded, payload, version=1):
    return PREFIX.pack(MAGIC, version, 0, len(encoded), bytes_crc32(encoded)) + encoded + payload


@pytest.mark.parametrize("profile", ["raw", "exact", "high"])
@pytest.mark.parametrize(
    "spec", [SPEC, KVSpec(1, 1, 64, 16, KVDtype.FLOAT8_E4M3, (Side.LATENT,)), dataclasses.replace(SPEC, layers=1)]
)
def test_what_was_built_is_read(profile, spec):
    page = PageObject(built(spec, profile), KEY)
    assert (page.header.key, page.header.spec, page.header.profile_name) == (KEY, spec, profile)
    assert page.parameter_sets == (b"" if profile == "raw" else b"parameters")
    for group, sides in zip(layer_groups(spec), groups_of(spec, profile), strict=True):
        for side in spec.sides:
            assert page.side_data(group.index, side) == sides[side]


def test_one_slice_of_the_object_holds_one_layer_group():
    data = built()
    header = read_header(data)
    assert len(header.group_ranges) == len(layer_groups(SPEC)) == 3
    assert header.group_ranges[0][0] == header.header_bytes
    assert header.group_ranges[-1][1] == header.object_bytes == len(data)
    for (start, stop), sides in zip(header.group_ranges, groups_of(SPEC, "exact"), strict=True):
        expected = b"".join(sides[side].picture.data + sides[side].stored for side in SPEC.sides)
        assert data[start:stop] == expected


def test_a_header_is_read_without_its_payload():
    data = built()
    size = header_bytes(data[: PREFIX.size])
    assert read_header(data[:size]) == read_header(data)


@pytest.mark.parametrize("profile", ["raw", "exact", "high"])
def test_every_truncation_is_refused(profile):
    data = built(profile=profile)
    for size in range(len(data)):
        with pytest.raises(TruncatedError):
            PageObject(data[:size])
    with pytest.raises(TruncatedError):
        PageObject(data + b"\0")


@pytest.mark.parametrize("profile", ["raw", "exact", "high"])
def test_every_flipped_bit_is_refused(profile):
    data = built(KVSpec(3, 1, 64, 16, KVDtype.BFLOAT16), profile)
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            PageObject(bytes(damaged))


@hypothesis.settings(max_examples=200)
@hypothesis.given(garbage=st.binary(max_size=200), head=st.sampled_from([b"", MAGIC, MAGIC + b"\1\0\0\0"]))
def test_garbage_is_refused(garbage, head):
    with pytest.raises(FormatError):
        PageObject(head + garbage)


@hypothesis.settings(max_examples=300)
@hypothesis.given(encoded=st.binary(max_size=300))
def test_any_bytes_for_a_manifest_are_a_format_error(encoded):
    with pytest.raises(FormatError):
        PageObject(with_header(encoded, b"payload"))


@hypothesis.settings(max_examples=300)
@hypothesis.given(data=st.data())
def test_a_manifest_changed_under_a_good_checksum_never_reads_outside_the_object(data):
    sound = built(profile="high")
    start = header_bytes(sound[: PREFIX.size])
    encoded = bytearray(sound[PREFIX.size : start])
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        page = PageObject(with_header(bytes(encoded), sound[start:]))
    except FormatError:
        return
    for group in layer_groups(page.header.spec):
        for side in page.header.spec.sides:
            page.side_data(group.index, side)


def test_a_foreign_page_is_refused():
    for expected in (PageKey(OTHER, KEY.page_hash), PageKey(KEY.namespace_digest, OTHER)):
        with pytest.raises(ForeignPageError):
            PageObject(built(), expected)


@pytest.mark.parametrize("version", [0, 2, 65535])
def test_another_version_is_refused(version):
    data = built()
    with pytest.raises(UnknownFormatError, match=f"version {version}"):
        PageObject(data[:4] + struct.pack("<H", version) + data[6:])
    with pytest.raises(UnknownFormatError, match=f"version {version}"):
        PageObject(with_manifest(data, lambda manifest: setattr(manifest, "format_version", version)))


UNKNOWN_CHANGES = {
    "profile": lambda m: setattr(m, "profile", "best"),
    "profile of other stages": lambda m: setattr(m, "profile", "high"),
    "stage": lambda m: m.stages.append("arithmetic/1"),
    "stage version": lambda m: m.stages.__setitem__(0, "exponent-split/2"),
    "stage missing": lambda m: m.stages.pop(),
    "dtype": lambda m: setattr(m.kv_spec, "dtype", "float4"),
    "side in the spec": lambda m: m.kv_spec.sides.append(9),
    "no sides": lambda m: m.kv_spec.ClearField("sides"),
    "no layers": lambda m: setattr(m.kv_spec, "layers", 0),
    "spec too large": lambda m: setattr(m.kv_spec, "head_dim", 65536),
    "spec far too large": lambda m: m.kv_spec.MergeFrom(pb.KVSpec(head_dim=65536, kv_heads=65536, page_tokens=65536)),
    "geometry": lambda m: setattr(m.geometry, "width", 320),
    "no geometry": lambda m: m.ClearField("geometry"),
    "layers of a picture": lambda m: setattr(m.geometry, "layers_per_picture", 6),
    "part kind": lambda m: setattr(m.groups[0].parts[0], "kind", 4),
    "part kind none": lambda m: setattr(m.groups[0].parts[0], "kind", 0),
    "part side": lambda m: setattr(m.groups[0].parts[0], "side", 3),
    "field": lambda m: m.MergeFromString(b"\xf8\x07\x01"),
    "field of the spec": lambda m: m.kv_spec.MergeFromString(b"\xf8\x07\x01"),
    "field of the geometry": lambda m: m.geometry.MergeFromString(b"\xf8\x07\x01"),
    "field of a group": lambda m: m.groups[1].MergeFromString(b"\xf8\x07\x01"),
    "field of a part": lambda m: m.groups[1].parts[1].MergeFromString(b"\xf8\x07\x01"),
}

CONTRADICTIONS = {
    "namespace too short": lambda m: setattr(m, "namespace_digest", bytes(31)),
    "hash too long": lambda m: setattr(m, "page_hash", bytes(33)),
    "group missing": lambda m: m.groups.pop(),
    "group twice": lambda m: m.groups.append(m.groups[0]),
    "group of other layers": lambda m: setattr(m.groups[0], "layers", 2),
    "groups swapped": lambda m: setattr(m.groups[0], "first_layer", 3),
    "side missing": lambda m: [m.groups[2].parts.pop() for _ in range(2)],
    "part twice": lambda m: setattr(m.groups[0].parts[1], "kind", pb.PART_KIND_PICTURE),
    "sides swapped": lambda m: [setattr(p, "side", 3 - p.side) for p in m.groups[0].parts],
    "gap": lambda m: setattr(m.groups[0].parts[1], "offset", 1000),
    "overlap": lambda m: setattr(m.groups[0].parts[1], "offset", 0),
    "huge part": lambda m: setattr(m.groups[2].parts[-1], "length", MAX_OBJECT_BYTES + 1),
    "endless part": lambda m: setattr(m.groups[2].parts[-1], "length", 2**64 - 1),
}


@pytest.mark.parametrize("name", UNKNOWN_CHANGES)
def test_what_this_version_does_not_know_is_refused(name):
    with pytest.raises(UnknownFormatError):
        PageObject(with_manifest(built(), UNKNOWN_CHANGES[name]))


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused(name):
    with pytest.raises(FormatError):
        PageObject(with_manifest(built(), CONTRADICTIONS[name]))


def test_a_spec_no_picture_holds_is_unknown_even_uncoded():
    huge = KVSpec(1, 1024, 1024, 64, KVDtype.BFLOAT16)
    data = with_manifest(
        built(dataclasses.replace(SPEC, layers=1), "raw"),
        lambda m: m.kv_spec.MergeFrom(pb.KVSpec(kv_heads=huge.kv_heads, head_dim=huge.head_dim)),
    )
    with pytest.raises(UnknownFormatError, match="fit no picture"):
        PageObject(data)


def test_a_part_with_another_checksum_is_damaged():
    data = with_manifest(built(), lambda m: setattr(m.groups[2].parts[0], "crc32", 1))
    with pytest.raises(ChecksumError, match="layer 6"):
        PageObject(data)


def test_a_manifest_that_claims_to_be_huge_is_refused_before_it_is_read():
    with pytest.raises(FormatError, match="too large"):
        header_bytes(PREFIX.pack(MAGIC, 1, 0, 2**32 - 1, 0))


@pytest.mark.parametrize(
    "add",
    [
        lambda m: m.stages.extend([""] * 200_000),
        lambda m: m.kv_spec.sides.extend([1] * 200_000),
        lambda m: m.groups.extend([pb.LayerGroup()] * 200_000),
        lambda m: m.groups[0].parts.extend([pb.Part()] * 200_000),
    ],
    ids=["stages", "sides", "groups", "parts"],
)
def test_a_manifest_of_more_than_there_can_be_is_refused_before_it_is_looked_through(add, monkeypatch):
    """It may have two million empty parts, which an interpreter would be busy with for seconds."""
    looked_through = []
    monkeypatch.setattr(page_object, "_refuse_unknown_fields", looked_through.append)
    with pytest.raises(UnknownFormatError, match="more stages"):
        PageObject(with_manifest(built(), add))
    assert looked_through == []
