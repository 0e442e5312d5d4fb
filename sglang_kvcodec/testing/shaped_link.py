"""A link between a peer and its clients whose speed is a function of time: one that falls, jitters or stalls.

A TCP relay on loopback. What the peer sends passes at the rate that the shape gives at that moment; what clients send
passes at once. Both may take some time on their way.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from types import TracebackType

Shape = Callable[[float, int], float]
"""Bytes per second, given the seconds and the bytes that have passed since :meth:`ShapedLink.begin`; 0 for a stall."""

_CHUNK_BYTES = 16 << 10
_MOST_ON_WAY = 1024
"""Chunks: what a link of 1 Gbit/s has under way in 130 ms."""
_STALL_POLL_S = 0.005
_LEAST_SLEEP_S = 0.001
_CREDIT_S = 0.005
"""Time that may be made up for: sleeps are too long by a millisecond or two."""


def steady(bytes_per_s: float) -> Shape:
    """Always the same."""
    return lambda seconds, passed_bytes: bytes_per_s


def falls(bytes_per_s: float, after_bytes: int, to: float = 0.1) -> Shape:
    """Falls to a share of what it was when so many bytes have passed."""
    return lambda seconds, passed_bytes: bytes_per_s if passed_bytes < after_bytes else bytes_per_s * to


def jitters(bytes_per_s: float, period_s: float = 0.05, seed: int = 0) -> Shape:
    """Another speed in each period, from a tenth to 1.9 times of what it is on average."""

    def shape(seconds: float, passed_bytes: int) -> float:
        return bytes_per_s * (0.1 + 1.8 * random.Random(f"{seed}/{int(seconds / period_s)}").random())

    return shape


def stalls(bytes_per_s: float, after_bytes: int, stall_s: float = 1.0) -> Shape:
    """Nothing passes for a while once so many bytes have."""
    begun_s: list[float] = []

    def shape(seconds: float, passed_bytes: int) -> float:
        if passed_bytes < after_bytes:
            begun_s.clear()
            return bytes_per_s
        if not begun_s:
            begun_s.append(seconds)
        return 0.0 if seconds < begun_s[0] + stall_s else bytes_per_s

    return shape


class ShapedLink:
    """Relays connections to a peer; a context manager that ends them all."""

    def __init__(self, upstream: str, shape: Shape, round_trip_s: float = 0.0) -> None:
        """Listens on a free port of loopback.

        Args:
            upstream: ``HOST:PORT`` of the peer, which may come and go.
            shape: of what the peer sends, all connections together.
            round_trip_s: how long what is sent is on its way, both ways together.
        """
        self._delay_s = round_trip_s / 2
        self._host, _, port = upstream.rpartition(":")
        self._port = int(port)
        self._begin(shape)
        self._next_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._turn = asyncio.Lock()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="shaped-link", daemon=True)
        self._thread.start()
        ready.wait()

    @property
    def remote(self) -> str:
        """What ``--kvcodec-remote`` takes."""
        return f"grpc://127.0.0.1:{self._listening}"

    @property
    def passed_bytes(self) -> int:
        """What the peer has sent since :meth:`begin`."""
        return self._passed_bytes

    def begin(self, shape: Shape) -> None:
        """Another shape, from its start."""
        self._loop.call_soon_threadsafe(self._begin, shape)

    def _begin(self, shape: Shape) -> None:
        self._shape, self._start_s, self._passed_bytes = shape, time.monotonic(), 0

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._relay, "127.0.0.1", 0, limit=_CHUNK_BYTES))
        self._listening = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        for task in self._tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
        self._loop.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            up_reader, up_writer = await asyncio.open_connection(self._host, self._port, limit=_CHUNK_BYTES)
            try:
                pumps = (self._pump(reader, up_writer, False), self._pump(up_reader, writer, True))
                ended = [asyncio.ensure_future(pump) for pump in pumps]
                try:
                    await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pump in ended:
                        pump.cancel()
                    await asyncio.gather(*ended, return_exceptions=True)
            finally:
                up_writer.close()
        except (OSError, asyncio.CancelledError):
            # The peer is away: the client sees its connection end, as it would without a relay. Or the relay ends.
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_shaped: bool) -> None:
        on_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MOST_ON_WAY)
        deliverer = asyncio.ensure_future(self._deliver(on_way, writer))
        try:
            while chunk := await reader.read(_CHUNK_BYTES):
                if is_shaped:
                    async with self._turn:
                        await self._wait(len(chunk))
                await on_way.put((time.monotonic() + self._delay_s, chunk))
                if deliverer.done():
                    deliverer.result()
            await on_way.join()
        finally:
            deliverer.cancel()
            await asyncio.gather(deliverer, return_exceptions=True)

    @staticmethod
    async def _deliver(on_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            due_s, chunk = await on_way.get()
            if (early_s := due_s - time.monotonic()) > 0:
                await asyncio.sleep(early_s)
            writer.write(chunk)
            await writer.drain()
            on_way.task_done()

    async def _wait(self, size_bytes: int) -> None:
        """Until so many bytes may pass."""
        while True:
            now_s = time.monotonic()
            rate = self._shape(now_s - self._start_s, self._passed_bytes)
            if rate > 0:
                break
            await asyncio.sleep(_STALL_POLL_S)
        self._next_s = max(now_s - _CREDIT_S, self._next_s) + size_bytes / rate
        self._passed_bytes += size_bytes
        if self._next_s - now_s > _LEAST_SLEEP_S:
            await asyncio.sleep(self._next_s - now_s)

    def close(self) -> None:
        """Ends all connections."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def __enter__(self) -> ShapedLink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
