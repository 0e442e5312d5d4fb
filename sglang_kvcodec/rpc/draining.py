"""The end of a peer: calls under way may end, new ones are refused with a status that has clients go elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

_HANDLERS = {
    # Whether request and response are streamed -> how a handler of that kind is called, and what makes one.
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


class Drain(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # the library has no types
    """Counts the calls of some services; refuses new ones after :meth:`begin`. For one event loop.

    Their methods are coroutines, also those that stream. Health and reflection answer to the end.
    """

    def __init__(self, services: Sequence[str]) -> None:
        """Counts the calls of ``services``, given by their full names."""
        self._prefixes = tuple(f"/{service}/" for service in services)
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_draining = False
        """Whether new calls are refused."""

    def begin(self) -> None:
        """Refuses calls from now on."""
        self.is_draining = True

    async def ended(self, timeout_s: float) -> bool:
        """Waits for the calls under way; whether they have ended in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return self._idle.is_set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """See the base class."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefixes):
            return handler
        name, make = _HANDLERS[handler.request_streaming, handler.response_streaming]
        method = getattr(handler, name)

        async def counted(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._under_way(context):
                return await method(request, context)

        return make(counted, handler.request_deserializer, handler.response_serializer)

    @contextlib.asynccontextmanager
    async def _under_way(self, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        if self.is_draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this peer is shutting down")
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()
