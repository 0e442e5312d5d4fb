"""Stores by URL. An engine's library is imported only when that engine is asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.storage.artifact_directory import DirectoryArtifactStore
from sglang_kvcodec.storage.artifact_memory import MemoryArtifactStore
from sglang_kvcodec.storage.artifacts import ARTIFACTS_DIRECTORY, ArtifactStore
from sglang_kvcodec.storage.base import StorageEngine

if TYPE_CHECKING:
    from sglang_kvcodec.storage.s3_bucket import S3Address

_REDIS_SCHEMES = {
    "redis": "HOST:PORT",
    "rediss": "HOST:PORT",
    "rediscluster": "HOST:PORT,...",
    "redisscluster": "HOST:PORT,...",
}
"""Scheme -> how what follows it is written."""


@contextlib.contextmanager
def open_store(
    url: str, capacity_bytes: int, calibration_capacity_bytes: int, calibration_directory: str | None = None
) -> Iterator[tuple[StorageEngine, ArtifactStore | None]]:
    """Everything that a peer keeps under one URL, as :func:`open_engine` takes it; closed at the end of the block.

    With ``lmdb:DIR`` the calibrations are in a directory inside ``DIR``, so that a peer owns both or neither. Engines
    on other machines keep no calibrations: there are none without a directory for them.

    Args:
        url: see :func:`open_engine`.
        capacity_bytes: bound of the bytes of all page objects together.
        calibration_capacity_bytes: bound of the bytes of all calibration artifacts together.
        calibration_directory: where to keep calibrations, if not where the engine has them.

    Raises:
        ConfigurationError: as :func:`open_engine`.
        StorageUnavailableError: as :func:`open_engine`.
    """
    if calibration_capacity_bytes < 1:
        raise ConfigurationError(
            f"a store needs a calibration capacity of at least 1 byte, not {calibration_capacity_bytes}"
        )
    with (
        contextlib.closing(open_engine(url, capacity_bytes)) as engine,
        contextlib.ExitStack() as stack,
    ):
        artifacts = _open_artifacts(url, calibration_capacity_bytes, calibration_directory)
        if artifacts is not None:
            stack.callback(artifacts.close)
        yield engine, artifacts


def open_engine(url: str, capacity_bytes: int) -> StorageEngine:
    """The engine that ``url`` names.

    Args:
        url: ``memory:`` (lost at exit), ``lmdb:DIR`` (kept in that directory, which is created if need be),
            ``redis://HOST:PORT`` and ``rediscluster://HOST:PORT,...`` (see :class:`RedisAddress`) or
            ``s3://BUCKET/PREFIX``, which peers share where it names an ``index`` in Redis (see :class:`S3Address`).
        capacity_bytes: bound of the bytes of all objects together.

    Raises:
        ConfigurationError: no such engine, no such package, a directory of something else, or a capacity below 1.
        StorageUnavailableError: the engine exists but can't be opened now: in use, read-only, disk full.
    """
    scheme, location = _parse(url)
    if capacity_bytes < 1:
        raise ConfigurationError(f"a store needs a capacity of at least 1 byte, not {capacity_bytes}")
    return _SCHEMES[scheme].open_engine(location, capacity_bytes)


def without_password(url: str) -> str:
    """A store's URL as it may be logged."""
    # An index's URL inside that of a store may be percent-encoded.
    url = re.sub(r"([?&]index=(?:\w+(?::|%3A)(?:/|%2F){2})?).*(@|%40)", r"\1***\2", url, flags=re.IGNORECASE)
    return re.sub(r"//[^/?]*@", "//***@", url)


def _open_artifacts(url: str, capacity_bytes: int, directory: str | None) -> ArtifactStore | None:
    if directory is not None:
        return DirectoryArtifactStore(_directory(directory), capacity_bytes)
    scheme, location = _parse(url)
    return _SCHEMES[scheme].open_artifacts(location, capacity_bytes)


def _parse(url: str) -> tuple[str, str]:
    scheme, colon, location = url.partition(":")
    if not colon or scheme not in _SCHEMES:
        known = ", ".join(known.form for known in _SCHEMES.values())
        raise ConfigurationError(f"unknown storage engine {without_password(url)!r}; there are {known}")
    return scheme, location


def _open_memory(location: str, capacity_bytes: int) -> StorageEngine:
    from sglang_kvcodec.storage.memory import MemoryEngine

    if location:
        raise ConfigurationError(f"the engine memory: has no location, but was given {location!r}")
    return MemoryEngine(capacity_bytes)


def _open_lmdb(location: str, capacity_bytes: int) -> StorageEngine:
    if not location:
        raise ConfigurationError("the engine lmdb: needs a directory: lmdb:DIR")
    try:
        from sglang_kvcodec.storage.lmdb_engine import LmdbEngine
    except ModuleNotFoundError as error:
        raise _needs_package(error, "lmdb", "lmdb", "server") from error
    return LmdbEngine(_directory(location), capacity_bytes)


def _open_redis(scheme: str, location: str, capacity_bytes: int) -> StorageEngine:
    try:
        from sglang_kvcodec.storage.redis_connection import RedisAddress
        from sglang_kvcodec.storage.redis_engine import RedisEngine
    except ModuleNotFoundError as error:
        raise _needs_package(error, scheme, "redis", "redis") from error
    return RedisEngine(RedisAddress.parse(scheme, location), capacity_bytes)


def _open_s3(location: str, capacity_bytes: int) -> StorageEngine:
    try:
        from sglang_kvcodec.storage.s3_bucket import S3Address
        from sglang_kvcodec.storage.s3_engine import S3Engine
    except ModuleNotFoundError as error:
        raise _needs_package(error, "s3", "obstore", "s3") from error
    address = S3Address.parse(location)
    return S3Engine(address, capacity_bytes) if address.index_url is None else _open_shared_s3(address, capacity_bytes)


def _open_shared_s3(address: S3Address, capacity_bytes: int) -> StorageEngine:
    try:
        from sglang_kvcodec.storage.redis_connection import RedisAddress
        from sglang_kvcodec.storage.s3_shared_engine import SharedS3Engine
    except ModuleNotFoundError as error:
        raise _needs_package(error, "s3", "redis", "redis,s3") from error
    scheme, _, location = (address.index_url or "").partition(":")
    if scheme not in _REDIS_SCHEMES:
        raise ConfigurationError("the index of an S3 store is in Redis: index=redis://HOST:PORT or its like")
    return SharedS3Engine(address, RedisAddress.parse(scheme, location), capacity_bytes)


def _needs_package(error: ModuleNotFoundError, scheme: str, package: str, extra: str) -> Exception:
    if error.name != package:
        return error
    return ConfigurationError(f"the engine {scheme}: needs the package {package}: pip install sglang-kvcodec[{extra}]")


def _open_memory_artifacts(location: str, capacity_bytes: int) -> ArtifactStore:
    return MemoryArtifactStore(capacity_bytes)


def _open_artifact_directory(location: str, capacity_bytes: int) -> ArtifactStore:
    return DirectoryArtifactStore(_directory(location) / ARTIFACTS_DIRECTORY, capacity_bytes)


def _open_no_artifacts(location: str, capacity_bytes: int) -> None:
    return None


def _directory(location: str) -> pathlib.Path:
    return pathlib.Path(location).expanduser()


@dataclasses.dataclass(frozen=True)
class _Scheme:
    form: str
    open_engine: Callable[[str, int], StorageEngine]
    open_artifacts: Callable[[str, int], ArtifactStore | None]


_SCHEMES = {
    "memory": _Scheme("memory:", _open_memory, _open_memory_artifacts),
    "lmdb": _Scheme("lmdb:DIR", _open_lmdb, _open_artifact_directory),
    **{
        scheme: _Scheme(f"{scheme}://{hosts}", functools.partial(_open_redis, scheme), _open_no_artifacts)
        for scheme, hosts in _REDIS_SCHEMES.items()
    },
    "s3": _Scheme("s3://BUCKET/PREFIX", _open_s3, _open_no_artifacts),
}
"""Scheme -> how its URL is written, and what opens it."""
