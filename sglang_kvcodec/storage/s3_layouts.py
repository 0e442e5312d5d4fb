"""Whose a prefix of a bucket is: one peer's, or that of peers that share it. Neither touches what is the other's.

Each layout has an object that marks it. Who takes a prefix writes its own mark first and then looks for the other, so
that of two that come at once at least one sees the other and goes.
"""

from __future__ import annotations

import re
import secrets

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.storage.s3_bucket import S3Bucket

OWNER = "owner"
"""Mark of a prefix that one peer has for itself: the token of that peer."""
_SHARED = "index"
_SHARED_MARK = "kvcodec-index-1\n"
_STORE_ID = re.compile(rf"{_SHARED_MARK}([0-9a-f]{{32}})\n")


def take_alone(bucket: S3Bucket, token: bytes) -> None:
    """Makes a prefix this peer's, whichever had it before.

    Raises:
        ConfigurationError: peers share it.
        StorageUnavailableError: no answer, or a refusal.
    """
    _require_not_shared(bucket)
    bucket.replace(OWNER, token)
    try:
        _require_not_shared(bucket)
    except ConfigurationError:
        bucket.delete([OWNER])
        raise


def join(bucket: S3Bucket) -> str:
    """The id of the store that peers share under a prefix: drawn by the first one, gone with the objects.

    Raises:
        ConfigurationError: one peer has it for itself, or the mark makes no sense.
        StorageUnavailableError: no answer, or a refusal.
    """
    is_new = bucket.get(_SHARED) is None and bucket.create(_SHARED, f"{_SHARED_MARK}{secrets.token_hex(16)}\n".encode())
    if bucket.head(OWNER) is not None:
        if is_new:
            bucket.delete([_SHARED])
        raise ConfigurationError(f"{bucket.where} is a store of one peer without index=; take another prefix")
    store_id = read_store_id(bucket)
    if store_id is None:
        raise ConfigurationError(f"{bucket.where}/{_SHARED} is not by this software or this version of it")
    return store_id


def read_store_id(bucket: S3Bucket) -> str | None:
    """The id of the store that is there now, None if it is none that peers share.

    Raises:
        StorageUnavailableError: no answer, or a refusal.
    """
    match = _STORE_ID.fullmatch((bucket.get(_SHARED) or b"").decode("ascii", "replace"))
    return None if match is None else match[1]


def _require_not_shared(bucket: S3Bucket) -> None:
    if bucket.head(_SHARED) is not None:
        raise ConfigurationError(f"{bucket.where} is a store that peers share: name its index, or take another prefix")
