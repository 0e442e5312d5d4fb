"""A storage peer in a thread of this process: fast to start, and its engine is at hand."""

from __future__ import annotations

import asyncio
import threading

from sglang_kvcodec.rpc.server import PeerServer
from sglang_kvcodec.storage.artifact_memory import MemoryArtifactStore
from sglang_kvcodec.storage.artifacts import ArtifactStore
from sglang_kvcodec.storage.base import StorageEngine

_ARTIFACT_CAPACITY_BYTES = 1 << 30


class LocalPeer:
    """Serves an engine until it is stopped."""

    def __init__(
        self, engine: StorageEngine, listen: str = "127.0.0.1:0", artifacts: ArtifactStore | None = None
    ) -> None:
        """Serves from now on.

        Args:
            engine: stays the caller's to close.
            listen: ``HOST:PORT``; port 0 takes a free one.
            artifacts: its calibrations, the caller's to close; by default a store in memory that ends with the peer.

        Raises:
            ConfigurationError: it can't listen there.
        """
        self.address = listen
        """Where it listens."""
        self._failures: list[BaseException] = []
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(
            target=self._run, args=(engine, listen, artifacts), name="local-peer", daemon=True
        )
        self._thread.start()
        self._ready.wait()
        if self._failures:
            self._thread.join()
            raise self._failures[0]

    @property
    def remote(self) -> str:
        """What ``--kvcodec-remote`` takes."""
        return f"grpc://{self.address}"

    def begin_stop(self) -> None:
        """Ends every call under way, without waiting. Fit for a hook of the engine, whose calls are waited for."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stopping.set)

    def stop(self) -> None:
        """Ends every call under way and waits until all is down. May be called twice."""
        self.begin_stop()
        self._thread.join()

    def _run(self, engine: StorageEngine, listen: str, artifacts: ArtifactStore | None) -> None:
        try:
            self._loop.run_until_complete(
                self._serve(engine, listen, artifacts or MemoryArtifactStore(_ARTIFACT_CAPACITY_BYTES))
            )
        finally:
            self._loop.close()

    async def _serve(self, engine: StorageEngine, listen: str, artifacts: ArtifactStore) -> None:
        server = PeerServer(engine, listen, artifacts=artifacts)
        try:
            await server.start()
        except BaseException as error:
            self._failures.append(error)
            self._ready.set()
            return
        self.address = server.address
        self._ready.set()
        await self._stopping.wait()
        await server.stop(0)
