"""Storage engines by URL. An engine's library is imported only when that engine is asked for."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.storage.base import StorageEngine


def open_engine(url: str, capacity_bytes: int) -> StorageEngine:
    """The engine that ``url`` names.

    Args:
        url: ``memory:`` (lost at exit) or ``lmdb:DIR`` (kept in that directory, which is created if need be).
        capacity_bytes: bound of the bytes of all objects together.

    Raises:
        ConfigurationError: no such engine, no such package, a directory of something else, or a capacity below 1.
        StorageUnavailableError: the engine exists but can't be opened now: in use, read-only, disk full.
    """
    scheme, colon, location = url.partition(":")
    if not colon or scheme not in _ENGINES:
        known = ", ".join(form for form, _ in _ENGINES.values())
        raise ConfigurationError(f"unknown storage engine {url!r}; there are {known}")
    if capacity_bytes < 1:
        raise ConfigurationError(f"a store needs a capacity of at least 1 byte, not {capacity_bytes}")
    return _ENGINES[scheme][1](location, capacity_bytes)


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
        if error.name != "lmdb":
            raise
        raise ConfigurationError(
            "the engine lmdb: needs the package lmdb: pip install sglang-kvcodec[server]"
        ) from error
    return LmdbEngine(pathlib.Path(location).expanduser(), capacity_bytes)


_ENGINES: dict[str, tuple[str, Callable[[str, int], StorageEngine]]] = {
    "memory": ("memory:", _open_memory),
    "lmdb": ("lmdb:DIR", _open_lmdb),
}
"""Scheme -> how its URL is written, and what opens it."""
