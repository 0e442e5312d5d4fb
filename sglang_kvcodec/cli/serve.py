"""``kvcodec serve``: runs a storage peer until SIGTERM or SIGINT. Needs neither torch nor SGLang."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
from collections.abc import Iterator

import prometheus_client

from sglang_kvcodec.cli.serve_security import add_security_arguments, check_listen, security, with_client_limits
from sglang_kvcodec.config import parse_bits_per_s, parse_bytes
from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.rpc.heap import keep_freed_memory
from sglang_kvcodec.rpc.peer_limits import PeerLimits
from sglang_kvcodec.rpc.scrub import Scrubber
from sglang_kvcodec.rpc.server import PeerServer

logger = logging.getLogger(__name__)

_SCRUB_BYTES_PER_S = 4 * 10**6


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``serve`` to the command."""
    parser = subparsers.add_parser("serve", help="run a storage peer", description="Runs a storage peer.")
    parser.add_argument("--listen", metavar="HOST:PORT", default="127.0.0.1:7440", help="port 0 takes a free one")
    parser.add_argument(
        "--store",
        metavar="URL",
        required=True,
        help="lmdb:DIR, memory: (lost at exit), redis://..., rediscluster://... or s3://...",
    )
    parser.add_argument("--capacity", metavar="SIZE", default="10GB", help="bound of the stored bytes, e.g. 50GB")
    parser.add_argument(
        "--calibration-capacity", metavar="SIZE", default="4GB", help="bound of the calibrations; none is ever evicted"
    )
    parser.add_argument(
        "--calibrations", metavar="DIR", help="keep calibrations there; without it redis and s3 stores have none"
    )
    parser.add_argument("--ttl", metavar="SECONDS", type=float, help="delete objects that long after their put")
    parser.add_argument(
        "--scrub-rate",
        metavar="SIZE",
        help="bytes a second that are read to find damaged objects, e.g. 4MB; 0 for none."
        " 4MB by default, 0 where the store is another machine's",
    )
    parser.add_argument("--metrics-port", metavar="PORT", type=int, help="serve Prometheus metrics on this port")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.add_argument(
        "--max-streams", metavar="N", type=int, default=PeerLimits.max_streams, help="fetches and puts at once"
    )
    parser.add_argument("--bandwidth-limit", metavar="RATE", help="bound of what fetches send together, e.g. 1Gbps")
    parser.add_argument(
        "--grace", metavar="SECONDS", type=float, default=10.0, help="time for running streams to end at shutdown"
    )
    add_security_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serves until a signal; 0 after a clean shutdown.

    Raises:
        KVCodecError: it can't serve as asked.
    """
    logging.basicConfig(
        level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    secured = security(arguments)
    host = check_listen(arguments.listen, arguments.insecure, secured)
    if arguments.ttl is not None and not arguments.ttl > 0:
        raise ConfigurationError("--ttl must be above 0")
    scrub_bytes_per_s = parse_bytes(arguments.scrub_rate) if arguments.scrub_rate is not None else None
    if arguments.max_streams < 1 or arguments.grace < 0:
        raise ConfigurationError("--max-streams must be at least 1, --grace at least 0")
    limits = PeerLimits(
        max_streams=arguments.max_streams,
        bandwidth_bits_per_s=parse_bits_per_s(arguments.bandwidth_limit) if arguments.bandwidth_limit else None,
    )
    limits = with_client_limits(limits, arguments)
    from sglang_kvcodec.storage import ExpiringEngine, MeteredEngine, ReadAheadEngine, open_store, without_password

    keep_freed_memory()
    capacity_bytes = parse_bytes(arguments.capacity)
    with (
        open_store(
            arguments.store, capacity_bytes, parse_bytes(arguments.calibration_capacity), arguments.calibrations
        ) as (engine, artifacts),
        _metrics_server(arguments.metrics_port, host) as metrics_address,
    ):
        if artifacts is None:
            logger.warning("this peer keeps no calibrations: name a directory for them with --calibrations")
        if arguments.metrics_port is not None:
            engine = MeteredEngine(engine)
        if engine.waits_for_network:
            engine = ReadAheadEngine(engine)
        if arguments.ttl is not None:
            engine = ExpiringEngine(engine, arguments.ttl)
        if scrub_bytes_per_s is None:
            scrub_bytes_per_s = 0 if engine.waits_for_network else _SCRUB_BYTES_PER_S
        words = f"store={without_password(arguments.store)} capacity={capacity_bytes}{metrics_address}"

        async def serve() -> None:
            await _serve(PeerServer(engine, arguments.listen, limits, artifacts, secured), arguments.grace, words)

        with contextlib.closing(Scrubber(engine, scrub_bytes_per_s)):
            asyncio.run(serve())
    return 0


async def _serve(server: PeerServer, grace_s: float, words: str) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    if server.asks_for_tokens:
        loop.add_signal_handler(signal.SIGHUP, server.reload_tokens)
    await server.start()
    print(f"kvcodec peer ready on {server.address} {words}", flush=True)
    await stopping.wait()
    logger.info("draining: running streams have %s s to end", grace_s)
    await server.stop(grace_s)
    logger.info("stopped")


@contextlib.contextmanager
def _metrics_server(port: int | None, host: str) -> Iterator[str]:
    """Serves this process's metrics; gives words for the line that says ready."""
    if port is None:
        yield ""
        return
    try:
        server, thread = prometheus_client.start_http_server(port, addr=host.strip("[]"))
    except (OSError, OverflowError) as error:
        raise ConfigurationError(f"can't serve metrics on {host}:{port}: {error}") from error
    try:
        yield f" metrics={host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
