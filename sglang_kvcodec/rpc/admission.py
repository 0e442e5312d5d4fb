"""Who calls a peer, and whether it may: tokens, scopes, and what stands for a client without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc
import grpc.aio

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.errors import AccessError, ForbiddenError, UnauthenticatedError
from sglang_kvcodec.rpc.errors import status_of
from sglang_kvcodec.rpc.tokens import TokenEntry, TokenFile

SCOPE_OF_METHOD = {
    "Lookup": "read",
    "Fetch": "read",
    "Put": "write",
    "Delete": "write",
    "Stat": None,
    "GetCalibration": "read",
    "ListCalibrations": "read",
    "PutCalibration": "write",
    "DeleteCalibration": "admin",
    "ListNamespaces": "admin",
    "ListPages": "admin",
    "StatPages": "admin",
    "ReadPages": "admin",
}
"""RPC -> the scope that its token needs; None where any token will do. One that is not listed is refused."""
_SCHEME = "bearer "


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who makes a call.

    Attributes:
        name: of the token, or the address where there are no tokens: what limits count by.
        token: None where there are no tokens.
        tenant_secret: what the keys of the tenant are derived with.
    """

    name: str
    token: TokenEntry | None = None
    tenant_secret: bytes = b""

    @property
    def tenant(self) -> str:
        """Whose pages and calibrations it sees; empty for the default tenant."""
        return self.token.tenant if self.token is not None else ""

    @property
    def is_operator(self) -> bool:
        """Whether it may know of all tenants, as how much the store holds: anybody without tokens, else no tenant."""
        return self.token is None or ("admin" in self.token.scopes and not self.token.tenant)


class Admission:
    """Lets in who may call. Without tokens that is everybody."""

    def __init__(self, tokens: TokenFile | None) -> None:
        self._tokens = tokens

    def caller(self, method: str, context: grpc.aio.ServicerContext) -> Caller:
        """Who makes this call.

        Raises:
            UnauthenticatedError: no token, an unknown or an expired one.
            ForbiddenError: the token has not the scope.
        """
        if self._tokens is None:
            return Caller(context.peer().rpartition(":")[0])
        caller = self.identify(context.invocation_metadata())
        scope = SCOPE_OF_METHOD[method]
        if scope is not None and caller.token is not None and scope not in caller.token.scopes:
            raise _counted("scope", ForbiddenError(f"the token {caller.name} has not the scope {scope}"))
        return caller

    def identify(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> Caller:
        """Whose token the metadata of a call hold.

        Raises:
            UnauthenticatedError: no token, an unknown or an expired one.
        """
        assert self._tokens is not None
        values = [value for key, value in metadata or () if key == "authorization"]
        if len(values) != 1 or not isinstance(values[0], str) or not values[0].lower().startswith(_SCHEME):
            raise _counted("no_token", UnauthenticatedError("this peer asks for a token: authorization: Bearer TOKEN"))
        table = self._tokens.table
        entry = table.find(values[0][len(_SCHEME) :].strip())
        if entry is None:
            raise _counted("unknown_token", UnauthenticatedError("this peer does not know the token"))
        if entry.is_expired:
            raise _counted("expired_token", UnauthenticatedError(f"the token {entry.name} has expired"))
        return Caller(entry.name, entry, table.tenant_secret)

    def require_operator(self, metadata: Iterable[tuple[str, str | bytes]], what: str) -> None:
        """Refuses ``what`` to those who may not know of all tenants; without tokens to nobody.

        Raises:
            UnauthenticatedError: no token, an unknown or an expired one.
            ForbiddenError: the token has not the scope admin, or is of a tenant.
        """
        if self._tokens is not None and not self.identify(metadata).is_operator:
            raise _counted("scope", ForbiddenError(f"{what} is for tokens of the scope admin, of no tenant"))

    def require_still(self, caller: Caller) -> None:
        """Refuses a caller whose token was withdrawn, changed or has expired while its call was under way.

        Raises:
            UnauthenticatedError: it was.
        """
        if self._tokens is None or caller.token is None:
            return
        if not self._tokens.admits(caller.token):
            raise _counted("withdrawn_token", UnauthenticatedError(f"the token {caller.name} is no longer valid"))


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Asks for tokens where a service does not itself: any for reflection, an operator's for all that is not named."""

    def __init__(self, admission: Admission, self_guarded: Iterable[str], for_any_token: Iterable[str]) -> None:
        """Guards what the server serves.

        Args:
            admission: knows the tokens.
            self_guarded: full names of services that are open, or ask for tokens themselves.
            for_any_token: full names of services for whoever has a token.
        """
        self._admission = admission
        self._self_guarded = frozenset(self_guarded)
        self._for_any_token = frozenset(for_any_token)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Passes on what may pass."""
        service = handler_call_details.method.rpartition("/")[0].removeprefix("/")
        if service not in self._self_guarded:
            try:
                if service in self._for_any_token:
                    self._admission.identify(handler_call_details.invocation_metadata)
                else:
                    self._admission.require_operator(handler_call_details.invocation_metadata or (), service)
            except AccessError as error:
                return _refusing(error)
        return await continuation(handler_call_details)


def _refusing(error: AccessError) -> grpc.RpcMethodHandler:
    async def refuse(_requests: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(*status_of(error))

    return grpc.stream_stream_rpc_method_handler(refuse)


def _counted(reason: str, error: AccessError) -> AccessError:
    peer_metrics.PEER_REFUSED.labels(reason).inc()
    return error
