"""One storage peer or several, by what ``--kvcodec-remote`` says."""

from __future__ import annotations

from sglang_kvcodec.config import Access, Timeouts, parse_remotes
from sglang_kvcodec.format.exchange import PeerTransport
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.rpc.several import SeveralPeers


def connect(
    remote: str, timeouts: Timeouts | None = None, replicas: int = 1, access: Access | None = None
) -> PeerTransport:
    """The peer, or the peers as one, that ``remote`` names; connects with the first call.

    Args:
        remote: ``grpc://HOST:PORT``, or several: ``grpc://HOST:PORT,HOST:PORT``; ``grpcs`` for TLS.
        timeouts: how long each phase may take.
        replicas: of several peers, on how many each page is kept.
        access: certificates and token, the same for all of them.

    Raises:
        ConfigurationError: not such a URL, no replicas, or files of ``access`` that are not what they should be.
    """
    addresses, scheme = parse_remotes(remote), remote.partition("://")[0]
    peers = {address: GrpcPeer(f"{scheme}://{address}", timeouts, access=access) for address in addresses}
    # The names decide where pages lie: with and without TLS the same.
    return peers[addresses[0]] if len(peers) == 1 else SeveralPeers(peers, replicas)
