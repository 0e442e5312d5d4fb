"""The page object: what is stored and sent, one per page. ``docs/format.md`` specifies the bytes.

``magic "KVPO" | u16 format version | u16 zero | u32 manifest bytes | u32 manifest CRC-32 | manifest | payload``,
little-endian. The manifest is the protobuf ``Manifest``; its parts tile the payload without gaps, layer group by layer
group, so that one slice of the object holds one layer group.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from sglang_kvcodec.config import MAX_OBJECT_BYTES
from sglang_kvcodec.errors import (
    ChecksumError,
    ForeignPageError,
    FormatError,
    TruncatedError,
    UnknownFormatError,
    UnsupportedError,
)
from sglang_kvcodec.format import page_object_pb2 as pb
from sglang_kvcodec.format.digest import Buffer, bytes_crc32
from sglang_kvcodec.format.namespace import FORMAT_VERSION, PAGE_HASH_BYTES, PageKey
from sglang_kvcodec.format.profile import Coding, get_profile
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, is_picture_size, layer_groups, picture_geometry

MAGIC = b"KVPO"
PREFIX = struct.Struct("<4sHHII")
MAX_MANIFEST_BYTES = 4 << 20
CALIBRATION_DIGEST_BYTES = 32
MAX_POSITION = 1 << 32
"""Beyond any model's context; the rotation's angles are exact enough up to here."""

_MOST_STAGES, _MOST_SIDES, _MOST_LAYERS, _KINDS = 16, 2, 1 << 16, 3
"""Of a manifest; of parts there is one of each kind."""

_SIDES = {Side.KEY: pb.SIDE_KEY, Side.VALUE: pb.SIDE_VALUE, Side.LATENT: pb.SIDE_LATENT}
_SIDES_BACK = {number: side for side, number in _SIDES.items()}


@dataclasses.dataclass(frozen=True)
class PicturePart:
    """One coded picture: an access unit without parameter sets. A page's own lies in the page's bytes."""

    data: bytes | memoryview
    plane_digest: int
    steps: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class SideData:
    """The coded KV of one side of one layer group of one page.

    Which fields are used depends on the profile: ``raw`` has ``stored``, ``exact`` has ``picture`` and ``stored``,
    ``high`` has ``picture`` (with steps) and ``escapes`` where there are any.
    """

    picture: PicturePart | None = None
    stored: bytes = b""
    escapes: bytes = b""


GroupData = dict[Side, SideData]


def build_page_object(
    key: PageKey,
    spec: KVSpec,
    profile_name: str,
    groups: Sequence[GroupData],
    parameter_sets: bytes = b"",
    calibration_digest: bytes = b"",
    first_position: int = 0,
    canvas_shape: tuple[int, int] | None = None,
) -> bytes:
    """The bytes of a page object.

    Args:
        key: where it will be stored.
        spec: what it holds.
        profile_name: how it was coded.
        groups: one entry per layer group of ``layer_groups(spec)``, with all of ``spec.sides``.
        parameter_sets: VPS, SPS and PPS that all pictures share; empty without pictures.
        calibration_digest: 32 bytes, empty for an uncalibrated profile.
        first_position: of the page's first token; 0 for an uncalibrated profile.
        canvas_shape: of the pictures; by default that of ``picture_geometry``, which an uncalibrated profile has.
    """
    profile = get_profile(profile_name, calibrated=bool(calibration_digest))
    manifest = pb.Manifest(
        format_version=FORMAT_VERSION,
        namespace_digest=key.namespace_digest,
        page_hash=key.page_hash,
        profile=profile.name,
        stages=profile.stages,
        calibration_digest=calibration_digest,
        kv_spec=_spec_to_pb(spec),
        parameter_sets=parameter_sets,
        first_position=first_position,
    )
    if profile.has_pictures:
        geometry = picture_geometry(spec)
        manifest.geometry.layers_per_picture = geometry.layers_per_picture
        rows, width = canvas_shape or geometry.canvas_shape
        manifest.geometry.width = width
        manifest.geometry.height = rows * 2 // 3
    payload: list[bytes | memoryview] = []
    offset = 0
    for group, sides in zip(layer_groups(spec), groups, strict=True):
        message = manifest.groups.add(first_layer=group.first_layer, layers=group.layers)
        for side in spec.sides:
            for kind, data in _parts_of(sides[side]):
                part = message.parts.add(
                    side=_SIDES[side], kind=kind, offset=offset, length=len(data), crc32=bytes_crc32(data)
                )
                picture = sides[side].picture
                if kind == pb.PART_KIND_PICTURE and picture is not None:
                    part.plane_digest = picture.plane_digest
                    part.steps.extend(picture.steps)
                payload.append(data)
                offset += len(data)
    encoded = manifest.SerializeToString(deterministic=True)
    prefix = PREFIX.pack(MAGIC, FORMAT_VERSION, 0, len(encoded), bytes_crc32(encoded))
    return b"".join([prefix, encoded, *payload])


def _parts_of(data: SideData) -> list[tuple[pb.PartKind, bytes | memoryview]]:
    parts: list[tuple[pb.PartKind, bytes | memoryview]] = []
    if data.picture is not None:
        parts.append((pb.PART_KIND_PICTURE, data.picture.data))
    if data.stored:
        parts.append((pb.PART_KIND_STORED, data.stored))
    if data.escapes:
        parts.append((pb.PART_KIND_ESCAPES, data.escapes))
    return parts


def _spec_to_pb(spec: KVSpec) -> pb.KVSpec:
    return pb.KVSpec(
        layers=spec.layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        page_tokens=spec.page_tokens,
        dtype=spec.dtype.torch_name,
        sides=[_SIDES[side] for side in spec.sides],
    )


def _spec_from_pb(message: pb.KVSpec) -> KVSpec:
    try:
        return KVSpec(
            layers=message.layers,
            kv_heads=message.kv_heads,
            head_dim=message.head_dim,
            page_tokens=message.page_tokens,
            dtype=KVDtype.from_torch_name(message.dtype),
            sides=tuple(_SIDES_BACK[side] for side in message.sides),
        )
    except (UnsupportedError, KeyError) as error:
        raise UnknownFormatError(f"a KV layout this version does not know: {error}") from error


def header_bytes(prefix: Buffer) -> int:
    """Size of prefix and manifest together, from the object's first :data:`PREFIX` bytes.

    Raises:
        FormatError: not the start of a page object of this format version.
    """
    if len(prefix) < PREFIX.size:
        raise TruncatedError(f"{len(prefix)} bytes are too few for a page object")
    magic, version, reserved, manifest_bytes, _ = PREFIX.unpack_from(prefix)
    if magic != MAGIC:
        raise UnknownFormatError("not a page object")
    if version != FORMAT_VERSION or reserved != 0:
        raise UnknownFormatError(f"page object of format version {version}; this version reads {FORMAT_VERSION}")
    if manifest_bytes > MAX_MANIFEST_BYTES:
        raise FormatError(f"a manifest of {manifest_bytes} bytes is too large")
    return PREFIX.size + int(manifest_bytes)


@dataclasses.dataclass(frozen=True)
class PageHeader:
    """The checked header of a page object.

    Attributes:
        key: the page it claims to be.
        calibration_digest: of the calibration that it needs; empty for none.
        first_position: of the page's first token, where it needs a calibration.
        header_bytes: where the payload starts.
        object_bytes: size of the whole object.
        group_ranges: per layer group, ``(start, stop)`` in bytes from the start of the object.
    """

    key: PageKey
    profile_name: str
    calibration_digest: bytes
    first_position: int
    spec: KVSpec
    header_bytes: int
    object_bytes: int
    group_ranges: tuple[tuple[int, int], ...]
    manifest: pb.Manifest

    @property
    def coding(self) -> Coding:
        """How it says that it is coded."""
        return Coding(self.profile_name, self.calibration_digest)


def read_header(data: Buffer) -> PageHeader:
    """Reads and checks the header; ``data`` starts with the header and may end with it.

    Raises:
        TruncatedError: too short.
        ChecksumError: the manifest is damaged.
        UnknownFormatError: a version, stage, enum value or field that this version does not know.
        FormatError: a manifest that contradicts itself.
    """
    view = memoryview(data)
    size = header_bytes(view[: PREFIX.size])
    if len(view) < size:
        raise TruncatedError(f"a header of {size} bytes is cut at {len(view)}")
    encoded = bytes(view[PREFIX.size : size])
    if bytes_crc32(encoded) != PREFIX.unpack_from(view)[4]:
        raise ChecksumError("the manifest is damaged")
    manifest = pb.Manifest()
    try:
        manifest.ParseFromString(encoded)
    except DecodeError as error:
        raise FormatError(f"not a manifest: {error}") from error
    _refuse_too_many(manifest)
    _refuse_unknown_fields(manifest)
    if manifest.format_version != FORMAT_VERSION:
        raise UnknownFormatError(f"manifest of format version {manifest.format_version}")
    digest_bytes = len(manifest.calibration_digest)
    if digest_bytes not in (0, CALIBRATION_DIGEST_BYTES):
        raise FormatError("a calibration digest of the wrong length")
    profile = get_profile(manifest.profile, calibrated=bool(digest_bytes))
    if manifest.first_position > (MAX_POSITION if profile.is_calibrated else 0):
        raise FormatError(f"a page of profile {profile.name!r} at position {manifest.first_position}")
    if tuple(manifest.stages) != profile.stages:
        raise UnknownFormatError(f"unknown stages {list(manifest.stages)} for profile {profile.name!r}")
    if len(manifest.namespace_digest) != PAGE_HASH_BYTES or len(manifest.page_hash) != PAGE_HASH_BYTES:
        raise FormatError("a key of the wrong length")
    spec = _spec_from_pb(manifest.kv_spec)
    try:
        geometry = picture_geometry(spec)
    except UnsupportedError as error:
        raise UnknownFormatError(str(error)) from error
    if profile.has_pictures:
        stated = (manifest.geometry.width, manifest.geometry.height)
        # How large pictures of components are is known to who has the calibration, and checked there.
        fits = is_picture_size(*stated) if profile.is_calibrated else stated == (geometry.width, geometry.height)
        if manifest.geometry.layers_per_picture != geometry.layers_per_picture or not fits:
            raise UnknownFormatError("the pictures have a geometry this version does not use")
    ranges, object_bytes = _group_ranges(manifest, spec, size)
    return PageHeader(
        key=PageKey(manifest.namespace_digest, manifest.page_hash),
        profile_name=profile.name,
        calibration_digest=manifest.calibration_digest,
        first_position=manifest.first_position,
        spec=spec,
        header_bytes=size,
        object_bytes=object_bytes,
        group_ranges=ranges,
        manifest=manifest,
    )


def _refuse_too_many(manifest: pb.Manifest) -> None:
    """Before anything is looked at one by one: 4 MiB hold two million parts, which take seconds and say nothing.

    What a later version has more of is not known to this one.
    """
    has_too_many = (
        len(manifest.stages) > _MOST_STAGES
        or len(manifest.kv_spec.sides) > _MOST_SIDES
        # Each group has a layer at least.
        or len(manifest.groups) > min(manifest.kv_spec.layers, _MOST_LAYERS)
        or any(len(group.parts) > _MOST_SIDES * _KINDS for group in manifest.groups)
    )
    if has_too_many:
        raise UnknownFormatError("more stages, sides, layer groups or parts than any page object has")


def _refuse_unknown_fields(message: Message) -> None:
    if len(UnknownFieldSet(message)):
        raise UnknownFormatError(f"unknown field in {type(message).__name__}")
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in value if field.is_repeated else [value]:
                _refuse_unknown_fields(child)


def _group_ranges(manifest: pb.Manifest, spec: KVSpec, start: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """Checks that the parts tile the payload and name every group and side; gives each group's slice."""
    groups = layer_groups(spec)
    if [(g.first_layer, g.layers) for g in manifest.groups] != [(g.first_layer, g.layers) for g in groups]:
        raise FormatError("the layer groups do not cover the layers")
    sides = [_SIDES[side] for side in spec.sides]
    kinds = (pb.PART_KIND_PICTURE, pb.PART_KIND_STORED, pb.PART_KIND_ESCAPES)
    offset = 0
    ranges = []
    for group in manifest.groups:
        first = offset
        seen: list[tuple[int, int]] = []
        for part in group.parts:
            if part.side not in sides or part.kind not in kinds:
                raise UnknownFormatError(f"unknown part: side {part.side}, kind {part.kind}")
            seen.append((sides.index(part.side), part.kind))
            if part.offset != offset or part.length > MAX_OBJECT_BYTES:
                raise FormatError("the parts do not tile the payload")
            offset += part.length
        if sorted(set(seen)) != seen:
            raise FormatError("the parts are out of order")
        if {side for side, _ in seen} != set(range(len(sides))):
            raise FormatError("a side is missing")
        ranges.append((start + first, start + offset))
    if start + offset > MAX_OBJECT_BYTES:
        raise FormatError(f"a page object of {start + offset} bytes is too large")
    return tuple(ranges), start + offset


class PageObject:
    """A whole page object in memory, every byte of it checked.

    The views it hands out are valid as long as the object lives.
    """

    def __init__(self, data: Buffer, expected: PageKey | None = None) -> None:
        """Checks ``data``.

        Args:
            data: exactly one page object; kept, not copied.
            expected: the page that was asked for.

        Raises:
            FormatError: see :func:`read_header`; also a wrong size or a damaged part.
            ForeignPageError: another page than ``expected``.
        """
        self._data = memoryview(data).toreadonly()
        self.header = read_header(self._data)
        if expected is not None and self.header.key != expected:
            raise ForeignPageError(f"asked for page {expected}, got {self.header.key}")
        if len(self._data) != self.header.object_bytes:
            raise TruncatedError(f"a page object of {self.header.object_bytes} bytes arrived as {len(self._data)}")
        for index in range(len(self.header.group_ranges)):
            self._check_group(index)

    def __len__(self) -> int:
        return len(self._data)

    @property
    def key(self) -> PageKey:
        """The page it is."""
        return self.header.key

    def to_bytes(self) -> bytes:
        """The object, as it is stored."""
        return bytes(self._data)

    def _check_group(self, group_index: int) -> None:
        """Raises ChecksumError if a part of the layer group is damaged."""
        group = self.header.manifest.groups[group_index]
        for part in group.parts:
            if bytes_crc32(self._slice(part)) != part.crc32:
                raise ChecksumError(f"page {self.header.key}: a part of layer {group.first_layer} is damaged")

    def _slice(self, part: pb.Part) -> memoryview:
        start = self.header.header_bytes + part.offset
        return self._data[start : start + part.length]

    @property
    def parameter_sets(self) -> bytes:
        """VPS, SPS and PPS of the pictures."""
        return self.header.manifest.parameter_sets

    def side_data(self, group_index: int, side: Side) -> SideData:
        """The coded KV of one side of one layer group. Side bytes are copied; a picture is a view."""
        picture: PicturePart | None = None
        stored = escapes = b""
        for part in self.header.manifest.groups[group_index].parts:
            if _SIDES_BACK[part.side] is not side:
                continue
            data = self._slice(part)
            if part.kind == pb.PART_KIND_PICTURE:
                picture = PicturePart(data, part.plane_digest, tuple(part.steps))
            elif part.kind == pb.PART_KIND_STORED:
                stored = bytes(data)
            else:
                escapes = bytes(data)
        return SideData(picture, stored, escapes)
