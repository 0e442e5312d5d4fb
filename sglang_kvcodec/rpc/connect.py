"""One storage peer or several, by what ``--kvcodec-remote`` says."""

from __future__ import annotations

from sglang_kvcodec.config import Timeouts, parse_remotes
from sglang_kvcodec.format.exchange import PeerTransport
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.rpc.several import SeveralPeers


def connect(remote: str, timeouts: Timeouts | None = None, replicas: int = 1) -> PeerTransport:
    """The peer, or the peers as one, that ``remote`` names; connects with the first call.

    Args:
        remote: ``grpc://HOST:PORT``, or several: ``grpc://HOST:PORT,HOST:PORT``.
        timeouts: how long each phase may take.
        replicas: of several peers, on how many each page is kept.

    Raises:
        ConfigurationError: not such a URL, or no replicas.
    """
    addresses = parse_remotes(remote)
    if len(addresses) == 1:
        return GrpcPeer(f"grpc://{addresses[0]}", timeouts)
    return SeveralPeers({address: GrpcPeer(f"grpc://{address}", timeouts) for address in addresses}, replicas)
