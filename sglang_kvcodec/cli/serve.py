"""``kvcodec serve``: runs a storage peer until SIGTERM or SIGINT. Needs neither torch nor SGLang."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Iterator

import prometheus_client

from sglang_kvcodec.cli import logs
from sglang_kvcodec.cli.serve_config import ENVIRONMENT_PREFIX, LiveSettings, Reloader, add_configuration
from sglang_kvcodec.cli.serve_security import (
    add_security_arguments,
    check_listen,
    check_metrics,
    security,
    with_client_limits,
)
from sglang_kvcodec.cli.serve_status import add_status_argument, check_status_page, status_page
from sglang_kvcodec.cli.settings import Resolved, Settings
from sglang_kvcodec.config import parse_bits_per_s, parse_bytes
from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.rpc.heap import keep_freed_memory, keep_lasting_objects
from sglang_kvcodec.rpc.peer_limits import PeerLimits
from sglang_kvcodec.rpc.scrub import Scrubber
from sglang_kvcodec.rpc.server import PeerServer

logger = logging.getLogger(__name__)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``serve`` to the command."""
    command = subparsers.add_parser(
        "serve",
        help="run a storage peer",
        description=f"Runs a storage peer. Each setting may be a flag, a variable {ENVIRONMENT_PREFIX}NAME, or a line"
        " of the file that --config names; the first of these that has it counts.",
    )
    parser = Settings(command, ENVIRONMENT_PREFIX)
    parser.add_argument("--listen", metavar="HOST:PORT", default="127.0.0.1:7440", help="port 0 takes a free one")
    parser.add_argument(
        "--store",
        metavar="URL",
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
    add_status_argument(parser)
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.add_argument(
        "--log-format", choices=logs.FORMATS, default="text", help="text for people, json: an object a line"
    )
    parser.add_argument(
        "--max-streams", metavar="N", type=int, default=PeerLimits.max_streams, help="fetches and puts at once"
    )
    parser.add_argument("--bandwidth-limit", metavar="RATE", help="bound of what fetches send together, e.g. 1Gbps")
    parser.add_argument(
        "--drain-s",
        "--grace",
        metavar="SECONDS",
        type=float,
        default=10.0,
        help="time for calls under way to end at shutdown",
    )
    add_security_arguments(parser)
    add_configuration(command, parser, run)


def run(arguments: argparse.Namespace, reread: Callable[[], Resolved]) -> int:
    """Serves until a signal; 0 after a clean shutdown.

    Args:
        arguments: the settings.
        reread: gives them anew, for a SIGHUP.

    Raises:
        KVCodecError: it can't serve as asked.
    """
    logs.set_up(arguments.log_level, arguments.log_format)
    if arguments.store is None:
        raise ConfigurationError("a peer needs a store: --store lmdb:DIR, for instance")
    secured = security(arguments)
    host = check_listen(arguments.listen, arguments.insecure, secured)
    check_status_page(arguments.status_page, arguments.insecure, secured)
    check_metrics(arguments.metrics_port, host, arguments.metrics_insecure or arguments.insecure)
    if arguments.ttl is not None and not arguments.ttl > 0:
        raise ConfigurationError("--ttl must be above 0")
    live = LiveSettings.parse(arguments)
    if arguments.max_streams < 1:
        raise ConfigurationError("--max-streams must be at least 1")
    limits = PeerLimits(
        max_streams=arguments.max_streams,
        bandwidth_bits_per_s=parse_bits_per_s(arguments.bandwidth_limit) if arguments.bandwidth_limit else None,
    )
    limits = with_client_limits(limits, arguments)
    from sglang_kvcodec.storage import ExpiringEngine, MeteredEngine, ReadAheadEngine, open_store, without_password

    keep_freed_memory()
    with (
        open_store(
            arguments.store, live.capacity_bytes, parse_bytes(arguments.calibration_capacity), arguments.calibrations
        ) as (engine, artifacts),
        _metrics_server(arguments.metrics_port, host) as metrics_address,
    ):
        if artifacts is None:
            logger.warning("this peer keeps no calibrations: name a directory for them with --calibrations")
        if arguments.metrics_port is not None or arguments.status_page is not None:
            engine = MeteredEngine(engine)
        if engine.waits_for_network:
            engine = ReadAheadEngine(engine)
        if arguments.ttl is not None:
            engine = ExpiringEngine(engine, arguments.ttl)
        store = without_password(arguments.store)

        async def serve(reloader: Reloader) -> None:
            server = PeerServer(engine, arguments.listen, limits, artifacts, secured)
            with status_page(arguments.status_page, server, secured, store) as status_address:
                words = f"store={store} capacity={live.capacity_bytes}{status_address}{metrics_address}"
                await _serve(server, reloader, words)

        with contextlib.closing(Scrubber(engine, live.scrub_bytes_per_s_of(engine))) as scrubber:
            asyncio.run(serve(Reloader(reread, arguments, engine, scrubber)))
    return 0


async def _serve(server: PeerServer, reloader: Reloader, words: str) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)

    def reload() -> None:
        server.reload_files()
        # In a thread: a smaller capacity may take a while.
        loop.run_in_executor(None, reloader.reload)

    loop.add_signal_handler(signal.SIGHUP, reload)
    await server.start()
    keep_lasting_objects()
    print(f"kvcodec peer ready on {server.address} {words}", flush=True)
    # Once more for those who collect logs.
    logger.info("ready on %s %s", server.address, words)
    await stopping.wait()
    logger.info("draining: calls under way have %s s to end", reloader.live.drain_s)
    await server.stop(reloader.live.drain_s)
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
