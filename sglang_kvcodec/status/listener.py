"""The port of the status page: a thread and an event loop of its own, apart from the peer's.

A connection gets one answer and ten seconds for everything, its TLS handshake included, and there are few at a time. So
whoever opens many and says little keeps others from the page, and nobody from the peer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import Callable

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.status.report import PERIOD_S, StatusReport
from sglang_kvcodec.status.site import StatusSite

logger = logging.getLogger(__name__)
_library_logger = logging.getLogger(f"{__name__}.library")
# It would tell of every request that is none, with a traceback, to whoever sends enough of them.
_library_logger.setLevel(logging.CRITICAL)

_CONNECTIONS = 32
_CONNECTION_S = 10.0
_BACKLOG = 64
_AFTER_FAILED_ACCEPT_S = 1.0


class StatusListener:
    """Serves a site from :meth:`__init__` to :meth:`close`."""

    def __init__(
        self,
        listen: str,
        site: StatusSite,
        report: StatusReport,
        context: Callable[[], ssl.SSLContext] | None = None,
        connection_s: float = _CONNECTION_S,
        connections: int = _CONNECTIONS,
    ) -> None:
        """Listens and serves.

        Args:
            listen: ``HOST:PORT``; port 0 takes a free one.
            site: answers requests.
            report: is given its samples.
            context: serves by TLS, and is asked anew for each connection; None for plaintext.
            connection_s: how long a connection may last.
            connections: how many there are at once; others wait.

        Raises:
            ConfigurationError: it can't listen there.
        """
        self._site = site
        self._report = report
        self._context = context
        self._connection_s = connection_s
        self._connections = connections
        host, _, port = listen.rpartition(":")
        try:
            self._socket = _listening(host.strip("[]"), int(port))
        except (OSError, OverflowError) as error:
            raise ConfigurationError(f"can't serve a status page on {listen}: {error}") from error
        self.url = f"{'http' if context is None else 'https'}://{host}:{self._socket.getsockname()[1]}/"
        """Of the page."""
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="kvcodec-status", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops at once, whoever is connected."""
        # Its loop may have ended by itself, over an error.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except Exception:
            # A thread's top: the peer goes on without its page.
            logger.exception("the status page has ended")

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._sample()), tasks.create_task(self._accept())]
            await self._stopping.wait()
            for task in running:
                task.cancel()
        # Connections are cancelled by the runner.

    async def _sample(self) -> None:
        while True:
            self._report.sample()
            await asyncio.sleep(PERIOD_S)

    async def _accept(self) -> None:
        server = _Server(
            self._answer,
            logger=_library_logger,
            access_log=None,
            keepalive_timeout=self._connection_s,
            lingering_time=0,
        )
        free = asyncio.Semaphore(self._connections)
        connections: set[asyncio.Task[None]] = set()

        def ended(task: asyncio.Task[None]) -> None:
            connections.discard(task)
            free.release()

        while True:
            # Those for whom there is no place wait in the kernel.
            await free.acquire()
            connection = await self._next_connection()
            task = asyncio.create_task(self._attend(server, connection))
            connections.add(task)
            task.add_done_callback(ended)

    async def _next_connection(self) -> socket.socket:
        while True:
            try:
                return (await self._loop.sock_accept(self._socket))[0]
            except OSError as error:
                # No descriptor is left, for instance: the peer needs what there is.
                logger.warning("the status page takes no connection: %s", error)
                await asyncio.sleep(_AFTER_FAILED_ACCEPT_S)

    async def _attend(self, server: _Server, connection: socket.socket) -> None:
        transport: asyncio.BaseTransport | None = None
        try:
            async with asyncio.timeout(self._connection_s):
                context = None if self._context is None else self._context()
                transport, handler = await self._loop.connect_accepted_socket(server, connection, ssl=context)
                await server.lost(handler)
        except (OSError, TimeoutError) as error:
            # Whatever it is, it is the client's, and it may come again.
            logger.debug("a connection to the status page has ended: %s", error)
        finally:
            if isinstance(transport, asyncio.Transport):
                transport.abort()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return self._site.answer(request)
        except Exception:
            # The top of a request: the next one may fare better.
            logger.exception("the status page could not answer")
            return web.Response(status=500, text="the status page failed; the log says why\n")


class _Server(web.Server):
    """Tells when a connection has ended."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self._open: dict[RequestHandler, asyncio.Event] = {}

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._open[handler] = asyncio.Event()

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._open.pop(handler).set()

    async def lost(self, handler: RequestHandler) -> None:
        """Waits until the connection of ``handler`` has ended."""
        if handler in self._open:
            await self._open[handler].wait()


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    listening.setblocking(False)
    return listening
