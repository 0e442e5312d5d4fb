"""The one seam between gRPC's status codes and this package's errors, in both directions."""

from __future__ import annotations

import re

import grpc

from sglang_kvcodec.errors import (
    CapacityError,
    ClientLimitError,
    ForbiddenError,
    FormatError,
    KVCodecError,
    NotFoundError,
    PeerDeniedError,
    PeerError,
    PeerRejectedError,
    PeerTimeoutError,
    PeerUnavailableError,
    PeerUntrustedError,
    UnauthenticatedError,
)

_HANDSHAKE_FAILED = re.compile(r"(Tls|Ssl) handshake failed|SSL_ERROR|[Vv]erification check failed")
"""gRPC has no status for a certificate that is refused: only the words of what is otherwise an absent peer tell."""

PEER_ERRORS_BY_STATUS: dict[grpc.StatusCode, type[PeerError]] = {
    # The call was ended from outside: the channel was closed, or the peer stopped.
    grpc.StatusCode.CANCELLED: PeerUnavailableError,
    # The peer, or what stands between, is broken: leave it alone for a while.
    grpc.StatusCode.UNKNOWN: PeerUnavailableError,
    grpc.StatusCode.INTERNAL: PeerUnavailableError,
    grpc.StatusCode.UNAVAILABLE: PeerUnavailableError,
    grpc.StatusCode.DATA_LOSS: PeerUnavailableError,
    grpc.StatusCode.ABORTED: PeerUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: PeerTimeoutError,
    # The same request would be refused again.
    grpc.StatusCode.INVALID_ARGUMENT: PeerRejectedError,
    grpc.StatusCode.NOT_FOUND: PeerRejectedError,
    grpc.StatusCode.ALREADY_EXISTS: PeerRejectedError,
    grpc.StatusCode.PERMISSION_DENIED: PeerDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: PeerDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: PeerRejectedError,
    grpc.StatusCode.FAILED_PRECONDITION: PeerRejectedError,
    grpc.StatusCode.OUT_OF_RANGE: PeerRejectedError,
    grpc.StatusCode.UNIMPLEMENTED: PeerRejectedError,
}
"""What a client raises for each status but OK."""


def peer_error(code: grpc.StatusCode, details: str | None, rpc: str, address: str) -> PeerError:
    """What a client raises for an RPC that ended with ``code``."""
    kind = PEER_ERRORS_BY_STATUS[code]
    if code is grpc.StatusCode.UNAVAILABLE and _HANDSHAKE_FAILED.search(details or ""):
        kind = PeerUntrustedError
    return kind(f"{rpc} at {address} failed: {details or 'no details'} ({code.name})")


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status, and the sentence for the client, of an RPC that ``error`` ended on the peer."""
    if isinstance(error, FormatError):
        return grpc.StatusCode.INVALID_ARGUMENT, str(error)
    if isinstance(error, NotFoundError):
        return grpc.StatusCode.NOT_FOUND, str(error)
    if isinstance(error, UnauthenticatedError):
        return grpc.StatusCode.UNAUTHENTICATED, str(error)
    if isinstance(error, ForbiddenError):
        return grpc.StatusCode.PERMISSION_DENIED, str(error)
    if isinstance(error, CapacityError | ClientLimitError):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
    if isinstance(error, PeerTimeoutError):
        return grpc.StatusCode.DEADLINE_EXCEEDED, str(error)
    if isinstance(error, KVCodecError):
        return grpc.StatusCode.UNAVAILABLE, str(error)
    return grpc.StatusCode.UNAVAILABLE, f"the peer failed: {type(error).__name__}"
