"""Storage engines of a peer. No torch."""

from sglang_kvcodec.storage.base import StorageEngine, StoreStat
from sglang_kvcodec.storage.registry import open_engine

__all__ = ["StorageEngine", "StoreStat", "open_engine"]
