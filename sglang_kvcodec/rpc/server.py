"""A storage peer: the servicer, health and reflection on one port."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.errors import ConfigurationError, StorageError
from sglang_kvcodec.rpc import admin
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.admin import AdminServicer
from sglang_kvcodec.rpc.admission import Admission, TokenInterceptor
from sglang_kvcodec.rpc.calibrations import CalibrationServicer
from sglang_kvcodec.rpc.calls import Calls
from sglang_kvcodec.rpc.certificates import ServerCertificates
from sglang_kvcodec.rpc.draining import Drain
from sglang_kvcodec.rpc.limits import server_options
from sglang_kvcodec.rpc.peer_limits import PeerLimits
from sglang_kvcodec.rpc.servicer import PeerServicer
from sglang_kvcodec.rpc.tenants import TenantViews
from sglang_kvcodec.rpc.tokens import TokenFile
from sglang_kvcodec.storage.artifacts import ArtifactStore
from sglang_kvcodec.storage.base import StorageEngine

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Peer"].full_name
_METRICS_PERIOD_S = 5.0
_TOKENS_PERIOD_S = 1.0
_CERTIFICATES_PERIOD_S = 10.0
_LAST_WORDS_S = 1.0


def _handlers(servicer: PeerServicer) -> grpc.GenericRpcHandler:
    """The service as ``protos/`` has it; the servicer reads requests itself, and writes what it streams."""
    unary, streamed = grpc.stream_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Lookup": unary(servicer.Lookup, None, pb.LookupResponse.SerializeToString),
            "Fetch": streamed(servicer.Fetch, None, None),
            "Put": unary(servicer.Put, None, pb.PutResponse.SerializeToString),
            "Delete": unary(servicer.Delete, None, pb.DeleteResponse.SerializeToString),
            "Stat": unary(servicer.Stat, None, pb.StatResponse.SerializeToString),
        },
    )


@dataclasses.dataclass(frozen=True)
class PeerSecurity:
    """How a peer knows its clients, and they know it.

    Attributes:
        certificates: serves by TLS; None for plaintext.
        tokens: asks for tokens; None for none. Health is open to all.
    """

    certificates: ServerCertificates | None = None
    tokens: TokenFile | None = None


class PeerServer:
    """Serves one engine on one port, in the running event loop."""

    def __init__(
        self,
        engine: StorageEngine,
        listen: str,
        limits: PeerLimits | None = None,
        artifacts: ArtifactStore | None = None,
        security: PeerSecurity | None = None,
    ) -> None:
        """Prepares a peer.

        Args:
            engine: stays the caller's to close, after :meth:`stop`.
            listen: ``HOST:PORT``; port 0 takes a free one.
            limits: what it takes on at once.
            artifacts: its calibrations, also the caller's to close; without them their RPCs are UNIMPLEMENTED.
            security: TLS and tokens; plaintext for everybody without.
        """
        limits = limits or PeerLimits()
        self._security = security or PeerSecurity()
        admission = self.admission = Admission(self._security.tokens)
        """Who may do what."""
        calls = Calls(admission, limits)
        guards = []
        if self._security.tokens is not None:
            self_guarded = (SERVICE, admin.SERVICE, health.SERVICE_NAME)
            guards.append(TokenInterceptor(admission, self_guarded, (reflection.SERVICE_NAME,)))
        self._engine = engine
        self._listen = listen
        views = TenantViews(engine)
        self.clients = calls.clients
        """What each client has done so far."""
        self._servicer = PeerServicer(engine, limits, calls, views)
        self.prefixes = self._servicer.prefixes
        """What Lookups have found."""
        self._calibrations = CalibrationServicer(artifacts, limits, calls) if artifacts is not None else None
        self._admin = AdminServicer(views, calls, self._servicer.bandwidth)
        self._health = health.aio.HealthServicer()
        self._drain = Drain((SERVICE, admin.SERVICE))
        self._server = grpc.aio.server(interceptors=(*guards, self._drain), options=server_options())
        self._tasks: list[asyncio.Task[None]] = []
        self.address = listen
        """Where it listens once started."""

    async def start(self) -> None:
        """Listens and serves.

        Raises:
            ConfigurationError: it can't listen there.
        """
        self._server.add_generic_rpc_handlers((_handlers(self._servicer),))
        if self._calibrations is not None:
            handler = grpc.method_handlers_generic_handler(SERVICE, self._calibrations.handlers)
            self._server.add_generic_rpc_handlers((handler,))
        handler = grpc.method_handlers_generic_handler(admin.SERVICE, self._admin.handlers)
        self._server.add_generic_rpc_handlers((handler,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, admin.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        try:
            port = self._add_port()
        except RuntimeError as error:
            raise ConfigurationError(f"can't listen on {self._listen}: the port is taken or not ours") from error
        self.address = f"{self._listen.rpartition(':')[0]}:{port}"
        await self._server.start()
        # The process: it is alive as long as it answers, also while it drains.
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self._set_ready(True)
        self._tasks.append(asyncio.create_task(self._export_store_metrics()))
        if self._security.tokens is not None:
            follow = _follow(self._security.tokens.reload_if_changed, _TOKENS_PERIOD_S, "tokens")
            self._tasks.append(asyncio.create_task(follow))
        if self._security.certificates is not None:
            # So that what is told of their expiry is right, also while nobody connects.
            follow = _follow(self._security.certificates.reload_if_changed, _CERTIFICATES_PERIOD_S, "certificates")
            self._tasks.append(asyncio.create_task(follow))

    @property
    def is_draining(self) -> bool:
        """Whether it refuses new calls, for it is about to end."""
        return self._drain.is_draining

    def reload_files(self) -> None:
        """Reads the tokens again, and certificates that have changed, in the background."""
        loop = asyncio.get_running_loop()
        if self._security.tokens is not None:
            loop.run_in_executor(None, self._security.tokens.reload_if_changed, True)
        if self._security.certificates is not None:
            loop.run_in_executor(None, self._security.certificates.reload_if_changed)

    async def stop(self, drain_s: float) -> None:
        """Drains: says NOT_SERVING, refuses new calls, lets running ones end within ``drain_s``, then ends them.

        It listens until then, so that probes hear what it says and clients why they are refused.
        """
        self._drain.begin()
        await self._set_ready(False)
        has_ended = await self._drain.ended(drain_s)
        # What has ended may still be on its way out; a probe that watches would stay for ever.
        await self._server.stop(_LAST_WORDS_S if has_ended and drain_s else 0)
        for task in self._tasks:
            task.cancel()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._servicer.close)
        await loop.run_in_executor(None, self._admin.close)
        if self._calibrations is not None:
            await loop.run_in_executor(None, self._calibrations.close)

    def _add_port(self) -> int:
        certificates = self._security.certificates
        if certificates is None:
            return int(self._server.add_insecure_port(self._listen))
        return int(self._server.add_secure_port(self._listen, certificates.credentials()))

    async def _export_store_metrics(self) -> None:
        evicted_before: int | None = None
        while True:
            try:
                stat = await asyncio.get_running_loop().run_in_executor(None, self._engine.stat)
            except StorageError as error:
                logger.warning("the store gives no account of itself: %s", error)
                await self._set_ready(False)
            else:
                await self._set_ready(not self._drain.is_draining)
                peer_metrics.STORE_OBJECTS.set(stat.objects)
                peer_metrics.STORE_BYTES.set(stat.stored_bytes)
                peer_metrics.STORE_CAPACITY_BYTES.set(stat.capacity_bytes)
                if evicted_before is not None:
                    peer_metrics.STORE_EVICTIONS.inc(max(0, stat.evicted_objects - evicted_before))
                evicted_before = stat.evicted_objects
            await asyncio.sleep(_METRICS_PERIOD_S)

    async def _set_ready(self, is_ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if is_ready else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(SERVICE, status)
        peer_metrics.PEER_READY.set(is_ready)


async def _follow(reload_if_changed: Callable[[], None], period_s: float, what: str) -> None:
    while True:
        await asyncio.sleep(period_s)
        try:
            await asyncio.get_running_loop().run_in_executor(None, reload_if_changed)
        except Exception:
            # A task's top: whatever it is, what was read before stays, and the next change is seen.
            logger.exception("the %s could not be read again", what)
