from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PutOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PUT_OUTCOME_UNSPECIFIED: _ClassVar[PutOutcome]
    PUT_OUTCOME_STORED: _ClassVar[PutOutcome]
    PUT_OUTCOME_ALREADY_STORED: _ClassVar[PutOutcome]
    PUT_OUTCOME_REJECTED: _ClassVar[PutOutcome]
    PUT_OUTCOME_NO_CAPACITY: _ClassVar[PutOutcome]
PUT_OUTCOME_UNSPECIFIED: PutOutcome
PUT_OUTCOME_STORED: PutOutcome
PUT_OUTCOME_ALREADY_STORED: PutOutcome
PUT_OUTCOME_REJECTED: PutOutcome
PUT_OUTCOME_NO_CAPACITY: PutOutcome

class LookupRequest(_message.Message):
    __slots__ = ("namespace_digest", "page_hashes")
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAGE_HASHES_FIELD_NUMBER: _ClassVar[int]
    namespace_digest: bytes
    page_hashes: bytes
    def __init__(self, namespace_digest: _Optional[bytes] = ..., page_hashes: _Optional[bytes] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("covered_pages", "present", "covered_bytes")
    COVERED_PAGES_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    COVERED_BYTES_FIELD_NUMBER: _ClassVar[int]
    covered_pages: int
    present: bytes
    covered_bytes: int
    def __init__(self, covered_pages: _Optional[int] = ..., present: _Optional[bytes] = ..., covered_bytes: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("namespace_digest", "page_hashes", "max_message_bytes")
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAGE_HASHES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    namespace_digest: bytes
    page_hashes: bytes
    max_message_bytes: int
    def __init__(self, namespace_digest: _Optional[bytes] = ..., page_hashes: _Optional[bytes] = ..., max_message_bytes: _Optional[int] = ...) -> None: ...

class PageHeader(_message.Message):
    __slots__ = ("page_index", "object_bytes", "header")
    PAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    OBJECT_BYTES_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    page_index: int
    object_bytes: int
    header: bytes
    def __init__(self, page_index: _Optional[int] = ..., object_bytes: _Optional[int] = ..., header: _Optional[bytes] = ...) -> None: ...

class Fragment(_message.Message):
    __slots__ = ("page_index", "offset", "data")
    PAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    page_index: int
    offset: int
    data: bytes
    def __init__(self, page_index: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("headers", "missing", "fragments")
    HEADERS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    FRAGMENTS_FIELD_NUMBER: _ClassVar[int]
    headers: _containers.RepeatedCompositeFieldContainer[PageHeader]
    missing: _containers.RepeatedScalarFieldContainer[int]
    fragments: _containers.RepeatedCompositeFieldContainer[Fragment]
    def __init__(self, headers: _Optional[_Iterable[_Union[PageHeader, _Mapping]]] = ..., missing: _Optional[_Iterable[int]] = ..., fragments: _Optional[_Iterable[_Union[Fragment, _Mapping]]] = ...) -> None: ...

class PutBegin(_message.Message):
    __slots__ = ("namespace_digest", "page_hash", "object_bytes")
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAGE_HASH_FIELD_NUMBER: _ClassVar[int]
    OBJECT_BYTES_FIELD_NUMBER: _ClassVar[int]
    namespace_digest: bytes
    page_hash: bytes
    object_bytes: int
    def __init__(self, namespace_digest: _Optional[bytes] = ..., page_hash: _Optional[bytes] = ..., object_bytes: _Optional[int] = ...) -> None: ...

class PutRequest(_message.Message):
    __slots__ = ("begin", "chunk", "commit")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    begin: PutBegin
    chunk: bytes
    commit: bool
    def __init__(self, begin: _Optional[_Union[PutBegin, _Mapping]] = ..., chunk: _Optional[bytes] = ..., commit: _Optional[bool] = ...) -> None: ...

class PutResult(_message.Message):
    __slots__ = ("outcome", "detail")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    outcome: PutOutcome
    detail: str
    def __init__(self, outcome: _Optional[_Union[PutOutcome, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class PutResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[PutResult]
    def __init__(self, results: _Optional[_Iterable[_Union[PutResult, _Mapping]]] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("namespace_digest", "page_hashes")
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAGE_HASHES_FIELD_NUMBER: _ClassVar[int]
    namespace_digest: bytes
    page_hashes: bytes
    def __init__(self, namespace_digest: _Optional[bytes] = ..., page_hashes: _Optional[bytes] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ("deleted_pages",)
    DELETED_PAGES_FIELD_NUMBER: _ClassVar[int]
    deleted_pages: int
    def __init__(self, deleted_pages: _Optional[int] = ...) -> None: ...

class StatRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatResponse(_message.Message):
    __slots__ = ("objects", "stored_bytes", "capacity_bytes", "evicted_objects", "engine", "format_version", "software_version")
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVICTED_OBJECTS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    objects: int
    stored_bytes: int
    capacity_bytes: int
    evicted_objects: int
    engine: str
    format_version: int
    software_version: str
    def __init__(self, objects: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., evicted_objects: _Optional[int] = ..., engine: _Optional[str] = ..., format_version: _Optional[int] = ..., software_version: _Optional[str] = ...) -> None: ...

class PutCalibrationBegin(_message.Message):
    __slots__ = ("model_digest", "digest", "size_bytes")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    model_digest: bytes
    digest: bytes
    size_bytes: int
    def __init__(self, model_digest: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class PutCalibrationRequest(_message.Message):
    __slots__ = ("begin", "chunk", "commit")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    begin: PutCalibrationBegin
    chunk: bytes
    commit: bool
    def __init__(self, begin: _Optional[_Union[PutCalibrationBegin, _Mapping]] = ..., chunk: _Optional[bytes] = ..., commit: _Optional[bool] = ...) -> None: ...

class PutCalibrationResponse(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class GetCalibrationRequest(_message.Message):
    __slots__ = ("model_digest", "digest")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    model_digest: bytes
    digest: bytes
    def __init__(self, model_digest: _Optional[bytes] = ..., digest: _Optional[bytes] = ...) -> None: ...

class GetCalibrationBegin(_message.Message):
    __slots__ = ("digest", "size_bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    size_bytes: int
    def __init__(self, digest: _Optional[bytes] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class GetCalibrationResponse(_message.Message):
    __slots__ = ("begin", "chunk")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    begin: GetCalibrationBegin
    chunk: bytes
    def __init__(self, begin: _Optional[_Union[GetCalibrationBegin, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class ListCalibrationsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Calibration(_message.Message):
    __slots__ = ("model_digest", "digest", "size_bytes", "stored_at_ms", "is_current")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    IS_CURRENT_FIELD_NUMBER: _ClassVar[int]
    model_digest: bytes
    digest: bytes
    size_bytes: int
    stored_at_ms: int
    is_current: bool
    def __init__(self, model_digest: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., size_bytes: _Optional[int] = ..., stored_at_ms: _Optional[int] = ..., is_current: _Optional[bool] = ...) -> None: ...

class ListCalibrationsResponse(_message.Message):
    __slots__ = ("calibrations",)
    CALIBRATIONS_FIELD_NUMBER: _ClassVar[int]
    calibrations: _containers.RepeatedCompositeFieldContainer[Calibration]
    def __init__(self, calibrations: _Optional[_Iterable[_Union[Calibration, _Mapping]]] = ...) -> None: ...

class DeleteCalibrationRequest(_message.Message):
    __slots__ = ("model_digest", "digest")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    model_digest: bytes
    digest: bytes
    def __init__(self, model_digest: _Optional[bytes] = ..., digest: _Optional[bytes] = ...) -> None: ...

class DeleteCalibrationResponse(_message.Message):
    __slots__ = ("deleted",)
    DELETED_FIELD_NUMBER: _ClassVar[int]
    deleted: bool
    def __init__(self, deleted: _Optional[bool] = ...) -> None: ...
