"""What every RPC of the peer has around it: who calls, counting, a status for each failure, bounds of its messages."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.errors import FormatError, PeerTimeoutError, StorageError
from sglang_kvcodec.rpc.admission import Admission, Caller
from sglang_kvcodec.rpc.client_tallies import ClientTallies, ClientTally
from sglang_kvcodec.rpc.errors import status_of
from sglang_kvcodec.rpc.peer_limits import PeerLimits
from sglang_kvcodec.rpc.requests import parsed
from sglang_kvcodec.rpc.shares import ClientBandwidth

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)


class Call:
    """One RPC under way: its caller, and its messages at the pace that the caller is entitled to, and bound to keep."""

    def __init__(
        self,
        context: grpc.aio.ServicerContext,
        caller: Caller,
        admission: Admission,
        limits: PeerLimits,
        bandwidth: ClientBandwidth,
        tally: ClientTally,
    ) -> None:
        self.caller = caller
        self.waited_s = 0.0
        """How long this call has waited for messages of the client."""
        self._context = context
        self._admission = admission
        self._limits = limits
        self._bandwidth = bandwidth
        self._tally = tally

    async def request(self, kind: type[M]) -> M:
        """The one request of a call.

        Raises:
            FormatError: there is none, or it is not one.
            PeerTimeoutError: it does not come.
        """
        data = await self.next_message()
        if data is None:
            raise FormatError(f"a call without its {kind.__name__}")
        return parsed(kind, data)

    async def next_message(self) -> bytes | None:
        """The next serialized message of the client; None at the end of its stream.

        Raises:
            PeerTimeoutError: it does not come.
            ClientLimitError: the client has too much under way.
        """
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(self._limits.idle_s):
                data = await self._context.read()
        except TimeoutError:
            raise self.too_slow(f"no message within {self._limits.idle_s} s") from None
        self.waited_s += time.monotonic() - started_s
        if data is grpc.aio.EOF:
            return None
        self._tally.received_bytes += len(data)
        # Before the next one is read, so that the client finds no room to send it.
        await self._bandwidth.take(self.caller.name, len(data))
        return bytes(data)

    async def write(self, encoded: bytes, counted_bytes: int) -> None:
        """Sends a serialized message; ``counted_bytes`` of it count as the caller's bandwidth.

        Raises:
            PeerTimeoutError: the client does not take it.
            ClientLimitError: the client has too much under way.
        """
        await self._bandwidth.take(self.caller.name, counted_bytes)
        try:
            async with asyncio.timeout(self._limits.idle_s):
                await self._context.write(encoded)
        except TimeoutError:
            raise self.too_slow(f"no message was taken within {self._limits.idle_s} s") from None
        self._tally.sent_bytes += counted_bytes

    def require_still_admitted(self) -> None:
        """Raises ``UnauthenticatedError`` if the caller's token is no longer valid; for calls that last."""
        self._admission.require_still(self.caller)

    def too_slow(self, words: str) -> PeerTimeoutError:
        """Counts a client that holds up the peer; what to raise."""
        peer_metrics.PEER_REFUSED.labels("slow").inc()
        return PeerTimeoutError(words)


class Calls:
    """Opens calls; one for all servicers of a peer, so that what counts by client counts all of them."""

    def __init__(self, admission: Admission, limits: PeerLimits) -> None:
        self._admission = admission
        self._limits = limits
        self._bandwidth = ClientBandwidth(limits.client_bandwidth_bits_per_s)
        self.clients = ClientTallies()
        """What each has done so far."""

    @property
    def message_bytes(self) -> int | None:
        """The largest sensible message under the clients' bandwidth; None where there is no limit."""
        return self._bandwidth.message_bytes

    @contextlib.asynccontextmanager
    async def __call__(self, method: str, context: grpc.aio.ServicerContext) -> AsyncIterator[Call]:
        """Lets a caller in or refuses it, counts the call, and turns whatever ends it into a status with a sentence."""
        started_s = time.perf_counter()
        status = grpc.StatusCode.OK
        try:
            caller = self._admission.caller(method, context)
            with self.clients.call(caller.name) as tally:
                yield Call(context, caller, self._admission, self._limits, self._bandwidth, tally)
        except asyncio.CancelledError:
            status = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:  # the top of a call: whatever an engine raises must not reach gRPC
            if context.done():
                status = grpc.StatusCode.CANCELLED
                return
            if isinstance(error, grpc.aio.InternalError):
                # gRPC could not send: the client has gone, of which the call itself hears a moment later.
                status = grpc.StatusCode.CANCELLED
                await context.abort(grpc.StatusCode.UNAVAILABLE, "a message could not be sent")
            status, sentence = status_of(error)
            if isinstance(error, StorageError):
                logger.warning("%s failed: %s", method, error)
            elif status is grpc.StatusCode.UNAVAILABLE:
                logger.exception("%s failed", method)
            await context.abort(status, sentence)
        finally:
            peer_metrics.PEER_RPCS.labels(method, status.name).inc()
            peer_metrics.PEER_RPC_SECONDS.labels(method).observe(time.perf_counter() - started_s)
