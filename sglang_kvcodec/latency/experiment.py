"""A whole measurement on servers of its own: starts them around a shaped peer, measures, and ends them."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.latency.samples import PLANNER, PREFILL, Method
from sglang_kvcodec.latency.servers import Lab, ShapedPeer
from sglang_kvcodec.latency.sglang_serving import ServingLoad, run_serving
from sglang_kvcodec.latency.sweep import AS_IS, PUBLISH_TIMEOUT_S, Progress, Sweep, SweepPlan
from sglang_kvcodec.testing.processes import KVCodecArgs
from sglang_kvcodec.testing.sglang_client import SGLangClient

Say = Callable[[str], object]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Site:
    """What servers are started with.

    Attributes:
        model: path or hub name.
        work_dir: for logs and the peer's store.
        capacity: of the store.
        trace: where the planner writes its trace.
        server_args: more arguments for every server.
        calibrations: artifacts of ``kvcodec calibrate``, one of each rank.
    """

    model: str
    work_dir: pathlib.Path
    capacity: str
    trace: pathlib.Path
    server_args: tuple[str, ...] = ()
    calibrations: tuple[bytes, ...] = ()


def methods_of(profiles: Sequence[str], planner_profile: str) -> list[Method]:
    """The server without kvcodec, a planner, and a server that takes every hit for each of ``profiles``.

    In the order in which groups of one would be measured: the first answers for the others, and what a planner with
    several tiers fetched of one it would not store in the others.
    """
    tiers = (Method(profile, profile, "always") for profile in profiles)
    return [Method(PREFILL), Method(PLANNER, planner_profile, "auto"), *tiers]


def run_on_own_servers(
    site: Site,
    groups: Sequence[Sequence[Method]],
    plan: SweepPlan,
    serving: ServingLoad | None,
    progress: Progress,
    say: Say,
) -> tuple[Sweep, list[Row]]:
    """Measures groups of servers one after another; what it found, and what SGLang's load generator found.

    Raises:
        OSError: a server is gone, or refused a request.
        RuntimeError: a server or the peer did not start, with the end of its log; or it did not do what it must.
        TimeoutError: it did not do so in time.
    """
    sweep, serving_rows = Sweep(plan, sum(map(len, groups)), progress), []
    with ShapedPeer(site.work_dir / "store", site.capacity) as peer:
        for group in groups:
            peer.start(plan.fastest)
            peer.put_calibrations(site.calibrations)
            with Lab(site.model, site.work_dir, site.server_args, say) as lab:
                clients = {}
                for method in group:
                    kvcodec = _kvcodec_args(method, peer.remote, site.trace) if method.has_kvcodec else None
                    clients[method] = lab.start_server(method.name, kvcodec, len(group)).client
                with_kvcodec = [client for method, client in clients.items() if method.has_kvcodec]
                sweep.run(clients, peer.start)
                if serving is not None:
                    for method, client in clients.items():
                        if method.name in (PREFILL, PLANNER):
                            shape = functools.partial(peer.start, clients=with_kvcodec)
                            serving_rows += drive(method, client, serving, plan.bandwidths, shape, site.work_dir, say)
    return sweep, serving_rows


def _kvcodec_args(method: Method, remote: str, trace: pathlib.Path) -> KVCodecArgs:
    extra = ("--kvcodec-trace", str(trace)) if method.name == PLANNER else ()
    return KVCodecArgs(remote, method.profile, extra, method.plan)


def drive(
    method: Method,
    client: SGLangClient,
    serving: ServingLoad,
    bandwidths: Sequence[str],
    shape: Callable[[str], object],
    work_dir: pathlib.Path,
    say: Say,
) -> list[Row]:
    """Drives a server by SGLang's load generator: without kvcodec once, with it at each bandwidth.

    A server with kvcodec gets the load once beforehand, so that its prefixes are stored, and forgets what it holds
    before each run.

    Raises:
        ProcessError: the generator failed.
        RuntimeError: the server did not publish what it had computed.
    """

    def row(bandwidth: str | None) -> Row:
        place = f"{method.name} at {bandwidth}" if bandwidth else method.name
        figures = run_serving(serving, client.base_url, f"serving {place}".replace(" ", "-"), work_dir)
        say(f"sglang.benchmark.serving: {place}: median TTFT {figures['median_ttft_ms']:.0f} ms")
        return {"method": method.name, "profile": method.profile or None, "bandwidth": bandwidth, **figures}

    if not method.has_kvcodec:
        client.flush_cache()
        return [row(None)]
    client.forget()
    run_serving(serving, client.base_url, f"serving-{method.name}-stores", work_dir)
    if not client.wait_published(PUBLISH_TIMEOUT_S):
        raise RuntimeError(f"{method.name} has not published the prefixes of sglang.benchmark.serving")
    rows = []
    for bandwidth in bandwidths:
        if bandwidth != AS_IS:
            shape(bandwidth)
        client.forget()
        rows.append(row(bandwidth))
    return rows


def run_on_servers(
    server: tuple[Method, SGLangClient],
    baseline: SGLangClient,
    plan: SweepPlan,
    serving: ServingLoad | None,
    work_dir: pathlib.Path,
    progress: Progress,
    say: Say,
) -> tuple[Sweep, list[Row]]:
    """Measures two servers that run already, with the link as it is; as :func:`run_on_own_servers`.

    Raises:
        OSError: a server is gone, or refused a request.
        RuntimeError: a server did not do what it must.
        TimeoutError: it did not do so in time.
    """
    clients = {Method(PREFILL): baseline, server[0]: server[1]}
    sweep, serving_rows = Sweep(plan, len(clients), progress), []
    sweep.run(clients, lambda bandwidth, served: None)
    if serving is not None:
        for method, client in clients.items():
            serving_rows += drive(method, client, serving, plan.bandwidths, lambda name: None, work_dir, say)
    return sweep, serving_rows


def check_servers(server: SGLangClient, baseline: SGLangClient) -> None:
    """Refuses servers that can't be compared.

    Raises:
        ConfigurationError: one does not answer, or the wrong one runs kvcodec.
    """
    for client in (server, baseline):
        if not client.is_healthy():
            raise ConfigurationError(f"no SGLang server answers at {client.base_url}")
    if not _has_kvcodec(server):
        raise ConfigurationError(
            f"{server.base_url} shows no metrics of kvcodec: start it with --enable-kvcodec and --enable-metrics"
        )
    if _has_kvcodec(baseline):
        raise ConfigurationError(f"{baseline.base_url} runs kvcodec: a baseline is a server without it")


def _has_kvcodec(client: SGLangClient) -> bool:
    try:
        return "kvcodec_peer_up" in client.metrics()
    except OSError:
        # A server without --enable-metrics has no such page.
        return False
