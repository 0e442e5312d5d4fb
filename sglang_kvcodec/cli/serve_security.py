"""The flags of ``kvcodec serve`` that say who may use the peer, and how much of it."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import pathlib
import re

from sglang_kvcodec.cli.settings import Settings
from sglang_kvcodec.config import is_loopback, parse_bits_per_s
from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.rpc.certificates import ServerCertificates
from sglang_kvcodec.rpc.peer_limits import PeerLimits
from sglang_kvcodec.rpc.server import PeerSecurity
from sglang_kvcodec.rpc.tokens import TokenFile

logger = logging.getLogger(__name__)


def add_security_arguments(parser: Settings) -> None:
    """Adds the flags."""
    group = parser.add_argument_group("security")
    group.add_argument("--tls-cert", metavar="FILE", type=pathlib.Path, help="serve by TLS with this certificate (PEM)")
    group.add_argument("--tls-key", metavar="FILE", type=pathlib.Path, help="its private key")
    group.add_argument(
        "--tls-client-ca", metavar="FILE", type=pathlib.Path, help="ask clients for a certificate that this CA signed"
    )
    group.add_argument(
        "--tokens", metavar="FILE", type=pathlib.Path, help="ask clients for a token of this file, see `kvcodec token`"
    )
    group.add_argument(
        "--client-max-streams", metavar="N", type=int, help="fetches and puts of one client at once; 3/4 of all"
    )
    group.add_argument(
        "--client-bandwidth-limit", metavar="RATE", help="bound of what one client sends and is sent, together"
    )
    group.add_argument(
        "--idle-timeout",
        metavar="SECONDS",
        type=float,
        default=PeerLimits.idle_s,
        help="longest time that a client may send nothing, or take nothing, inside a call"
        f" (default: {PeerLimits.idle_s:g})",
    )
    group.add_argument(
        "--insecure", action="store_true", help="allow plaintext, or no authentication, beyond this machine"
    )
    group.add_argument(
        "--metrics-insecure",
        action="store_true",
        help="allow the metrics port, which is in plaintext and open to all, beyond this machine",
    )


def security(arguments: argparse.Namespace) -> PeerSecurity:
    """What the parsed flags say.

    Raises:
        ConfigurationError: half a pair of flags, or a file that can't be used.
    """
    if (arguments.tls_cert is None) != (arguments.tls_key is None):
        raise ConfigurationError("--tls-cert and --tls-key go together")
    if arguments.tls_client_ca is not None and arguments.tls_cert is None:
        raise ConfigurationError("--tls-client-ca needs --tls-cert and --tls-key")
    return PeerSecurity(
        ServerCertificates(arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca)
        if arguments.tls_cert is not None
        else None,
        TokenFile(arguments.tokens) if arguments.tokens is not None else None,
    )


def with_client_limits(limits: PeerLimits, arguments: argparse.Namespace) -> PeerLimits:
    """``limits`` with those of one client.

    Raises:
        ConfigurationError: a value that is none.
    """
    if arguments.client_max_streams is not None and arguments.client_max_streams < 1:
        raise ConfigurationError("--client-max-streams must be at least 1")
    if not arguments.idle_timeout > 0:
        raise ConfigurationError("--idle-timeout must be above 0")
    rate = arguments.client_bandwidth_limit
    return dataclasses.replace(
        limits,
        idle_s=arguments.idle_timeout,
        client_streams=arguments.client_max_streams,
        client_bandwidth_bits_per_s=parse_bits_per_s(rate) if rate else None,
    )


def check_listen(listen: str, insecure: bool, security: PeerSecurity) -> str:
    """The host of ``HOST:PORT``.

    Raises:
        ConfigurationError: not an address, or one beyond this machine that is not secured, without ``insecure``.
    """
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):(\d{1,5})", listen)
    if match is None or int(match[2]) > 65535:
        raise ConfigurationError(f"can't listen on {listen!r}; write HOST:PORT")
    lacking = _lacking(security)
    if not lacking or is_loopback(match[1]):
        return match[1]
    if not insecure:
        raise ConfigurationError(
            f"{listen} is open to other machines, {lacking[0]}; listen on 127.0.0.1, {lacking[1]}, "
            "or add --insecure where the network is trusted"
        )
    logger.warning("%s on %s: %s", *(lacking[0], listen, lacking[2]))
    return match[1]


def check_metrics(port: int | None, host: str, insecure: bool) -> None:
    """Refuses a metrics port beyond this machine: it knows neither TLS nor tokens.

    Args:
        port: that of the metrics; None for none.
        host: where they would be served, see :func:`check_listen`.
        insecure: whether they may be all the same.

    Raises:
        ConfigurationError: other machines would reach it, without ``insecure``.
    """
    if port is None or is_loopback(host):
        return
    if not insecure:
        raise ConfigurationError(
            f"the metrics port on {host} is open to other machines, in plaintext without authentication; "
            "listen on 127.0.0.1, leave out --metrics-port, or add --metrics-insecure where the network is trusted"
        )
    logger.warning("the metrics port on %s is in plaintext without authentication: whoever reaches it reads them", host)


def _lacking(security: PeerSecurity) -> tuple[str, str, str] | None:
    """What the peer is without, what to do about it, and what follows; None where nothing is lacking."""
    everybody = "whoever reaches it reads and writes the cache"
    knows_clients = security.tokens is not None or (
        security.certificates is not None and security.certificates.requires_client_certificate
    )
    if security.certificates is None:
        if knows_clients:
            return "plaintext", "serve by TLS with --tls-cert", "whoever listens on the network reads tokens and pages"
        return "plaintext without authentication", "serve by TLS with --tls-cert and ask for --tokens", everybody
    if not knows_clients:
        return "without authentication", "ask for --tokens or --tls-client-ca", everybody
    return None
