from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListNamespacesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NamespaceUse(_message.Message):
    __slots__ = ("namespace_digest", "objects", "stored_bytes")
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    OBJECTS_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    namespace_digest: bytes
    objects: int
    stored_bytes: int
    def __init__(self, namespace_digest: _Optional[bytes] = ..., objects: _Optional[int] = ..., stored_bytes: _Optional[int] = ...) -> None: ...

class ListNamespacesResponse(_message.Message):
    __slots__ = ("namespaces",)
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    namespaces: _containers.RepeatedCompositeFieldContainer[NamespaceUse]
    def __init__(self, namespaces: _Optional[_Iterable[_Union[NamespaceUse, _Mapping]]] = ...) -> None: ...

class ListPagesRequest(_message.Message):
    __slots__ = ("namespace_digest",)
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    namespace_digest: bytes
    def __init__(self, namespace_digest: _Optional[bytes] = ...) -> None: ...

class ListedPage(_message.Message):
    __slots__ = ("namespace_digest", "page_hash", "object_bytes", "stored_at_ms")
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAGE_HASH_FIELD_NUMBER: _ClassVar[int]
    OBJECT_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    namespace_digest: bytes
    page_hash: bytes
    object_bytes: int
    stored_at_ms: int
    def __init__(self, namespace_digest: _Optional[bytes] = ..., page_hash: _Optional[bytes] = ..., object_bytes: _Optional[int] = ..., stored_at_ms: _Optional[int] = ...) -> None: ...

class ListPagesResponse(_message.Message):
    __slots__ = ("pages",)
    PAGES_FIELD_NUMBER: _ClassVar[int]
    pages: _containers.RepeatedCompositeFieldContainer[ListedPage]
    def __init__(self, pages: _Optional[_Iterable[_Union[ListedPage, _Mapping]]] = ...) -> None: ...

class StatPagesRequest(_message.Message):
    __slots__ = ("namespace_digest", "page_hashes")
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAGE_HASHES_FIELD_NUMBER: _ClassVar[int]
    namespace_digest: bytes
    page_hashes: bytes
    def __init__(self, namespace_digest: _Optional[bytes] = ..., page_hashes: _Optional[bytes] = ...) -> None: ...

class StatPagesResponse(_message.Message):
    __slots__ = ("object_bytes",)
    OBJECT_BYTES_FIELD_NUMBER: _ClassVar[int]
    object_bytes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, object_bytes: _Optional[_Iterable[int]] = ...) -> None: ...

class ReadPagesRequest(_message.Message):
    __slots__ = ("namespace_digest", "page_hashes", "without_data")
    NAMESPACE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAGE_HASHES_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_DATA_FIELD_NUMBER: _ClassVar[int]
    namespace_digest: bytes
    page_hashes: bytes
    without_data: bool
    def __init__(self, namespace_digest: _Optional[bytes] = ..., page_hashes: _Optional[bytes] = ..., without_data: _Optional[bool] = ...) -> None: ...

class ReadPagesBegin(_message.Message):
    __slots__ = ("page_index", "is_missing", "object_bytes")
    PAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    IS_MISSING_FIELD_NUMBER: _ClassVar[int]
    OBJECT_BYTES_FIELD_NUMBER: _ClassVar[int]
    page_index: int
    is_missing: bool
    object_bytes: int
    def __init__(self, page_index: _Optional[int] = ..., is_missing: _Optional[bool] = ..., object_bytes: _Optional[int] = ...) -> None: ...

class ReadPagesResponse(_message.Message):
    __slots__ = ("begin", "chunk")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    begin: ReadPagesBegin
    chunk: bytes
    def __init__(self, begin: _Optional[_Union[ReadPagesBegin, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...
