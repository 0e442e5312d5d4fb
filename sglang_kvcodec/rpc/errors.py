"""The one seam between gRPC's status codes and this package's errors, in both directions."""

from __future__ import annotations

import grpc

from sglang_kvcodec.errors import (
    CapacityError,
    FormatError,
    KVCodecError,
    NotFoundError,
    PeerError,
    PeerRejectedError,
    PeerTimeoutError,
    PeerUnavailableError,
)

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
    grpc.StatusCode.PERMISSION_DENIED: PeerRejectedError,
    grpc.StatusCode.UNAUTHENTICATED: PeerRejectedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: PeerRejectedError,
    grpc.StatusCode.FAILED_PRECONDITION: PeerRejectedError,
    grpc.StatusCode.OUT_OF_RANGE: PeerRejectedError,
    grpc.StatusCode.UNIMPLEMENTED: PeerRejectedError,
}
"""What a client raises for each status but OK."""


def peer_error(code: grpc.StatusCode, details: str | None, rpc: str, address: str) -> PeerError:
    """What a client raises for an RPC that ended with ``code``."""
    kind = PEER_ERRORS_BY_STATUS[code]
    return kind(f"{rpc} at {address} failed: {details or 'no details'} ({code.name})")


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status, and the sentence for the client, of an RPC that ``error`` ended on the peer."""
    if isinstance(error, FormatError):
        return grpc.StatusCode.INVALID_ARGUMENT, str(error)
    if isinstance(error, NotFoundError):
        return grpc.StatusCode.NOT_FOUND, str(error)
    if isinstance(error, CapacityError):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
    if isinstance(error, PeerTimeoutError):
        return grpc.StatusCode.DEADLINE_EXCEEDED, str(error)
    if isinstance(error, KVCodecError):
        return grpc.StatusCode.UNAVAILABLE, str(error)
    return grpc.StatusCode.UNAVAILABLE, f"the peer failed: {type(error).__name__}"
