"""What a peer keeps: storage engines for pages, stores for calibration artifacts. No torch."""

from sglang_kvcodec.storage.artifacts import ArtifactStore
from sglang_kvcodec.storage.base import StorageEngine, StoredObject, StoreStat
from sglang_kvcodec.storage.read_ahead import ReadAheadEngine
from sglang_kvcodec.storage.registry import open_engine, open_store, without_password
from sglang_kvcodec.storage.wrappers import EngineWrapper, ExpiringEngine, FaultyEngine, MeteredEngine

__all__ = [
    "ArtifactStore",
    "EngineWrapper",
    "ExpiringEngine",
    "FaultyEngine",
    "MeteredEngine",
    "ReadAheadEngine",
    "StorageEngine",
    "StoreStat",
    "StoredObject",
    "open_engine",
    "open_store",
    "without_password",
]
