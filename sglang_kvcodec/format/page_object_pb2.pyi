from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Side(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SIDE_UNSPECIFIED: _ClassVar[Side]
    SIDE_KEY: _ClassVar[Side]
    SIDE_VALUE: _ClassVar[Side]
    SIDE_LATENT: _ClassVar[Side]

class PartKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PART_KIND_UNSPECIFIED: _ClassVar[PartKind]
    PART_KIND_PICTURE: _ClassVar[PartKind]
    PART_KIND_STORED: _ClassVar[PartKind]
    PART_KIND_ESCAPES: _ClassVar[PartKind]
SIDE_UNSPECIFIED: Side
SIDE_KEY: Side
SIDE_VALUE: Side
SIDE_LATENT: Side
PART_KIND_UNSPECIFIED: PartKind
PART_KIND_PICTURE: PartKind
PART_KIND_STORED: PartKind
PART_KIND_ESCAPES: PartKind

class KVSpec(_message.Message):
    __slots__ = ("layers", "kv_heads", "head_dim", "page_tokens", "dtype", "sides")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SIDES_FIELD_NUMBER: _ClassVar[int]
    layers: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    dtype: str
    sides: _containers.RepeatedScalarFieldContainer[Side]
    def __init__(self, layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., page_tokens: _Optional[int] = ..., dtype: _Optional[str] = ..., sides: _Optional[_Iterable[_Union[Side, str]]] = ...) -> None: ...

class PictureGeometry(_message.Message):
    __slots__ = ("layers_per_picture", "width", "height")
    LAYERS_PER_PICTURE_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    layers_per_picture: int
    width: int
    height: int
    def __init__(self, layers_per_picture: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("side", "kind", "offset", "length", "crc32", "plane_digest", "steps")
    SIDE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    PLANE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    side: Side
    kind: PartKind
    offset: int
    length: int
    crc32: int
    plane_digest: int
    steps: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, side: _Optional[_Union[Side, str]] = ..., kind: _Optional[_Union[PartKind, str]] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., crc32: _Optional[int] = ..., plane_digest: _Optional[int] = ..., steps: _Optional[_Iterable[float]] = ...) -> None: ...

class LayerGroup(_message.Message):
    __slots__ = ("first_layer", "layers", "parts")
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    first_layer: int
    layers: int
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    def __init__(self, first_layer: _Optional[int] = ..., layers: _Optional[int] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("format_version", "namespace_digest", "page_hash", "profile", "stages", "calibration_digest", "kv_spec", "geometry", "parameter_sets", "groups", "first_position")
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAGE_HASH_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_DIGEST_FIELD_NUMBER: _ClassVar[int]
    KV_SPEC_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_SETS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    namespace_digest: bytes
    page_hash: bytes
    profile: str
    stages: _containers.RepeatedScalarFieldContainer[str]
    calibration_digest: bytes
    kv_spec: KVSpec
    geometry: PictureGeometry
    parameter_sets: bytes
    groups: _containers.RepeatedCompositeFieldContainer[LayerGroup]
    first_position: int
    def __init__(self, format_version: _Optional[int] = ..., namespace_digest: _Optional[bytes] = ..., page_hash: _Optional[bytes] = ..., profile: _Optional[str] = ..., stages: _Optional[_Iterable[str]] = ..., calibration_digest: _Optional[bytes] = ..., kv_spec: _Optional[_Union[KVSpec, _Mapping]] = ..., geometry: _Optional[_Union[PictureGeometry, _Mapping]] = ..., parameter_sets: _Optional[bytes] = ..., groups: _Optional[_Iterable[_Union[LayerGroup, _Mapping]]] = ..., first_position: _Optional[int] = ...) -> None: ...
