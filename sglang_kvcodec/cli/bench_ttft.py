"""``kvcodec bench ttft``: time to the first token against bandwidth, on real servers."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import pathlib
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from types import FrameType
from typing import Any

from sglang_kvcodec.cli.output import ProgressBar, prepare_out
from sglang_kvcodec.config import PROFILES, ServerConfig, parse_bytes
from sglang_kvcodec.errors import ConfigurationError, KVCodecError
from sglang_kvcodec.evaluation.tables import check_can_draw, table
from sglang_kvcodec.format.profile import CALIBRATED_TIERS
from sglang_kvcodec.latency import results
from sglang_kvcodec.latency.experiment import (
    Site,
    check_servers,
    methods_of,
    run_on_own_servers,
    run_on_servers,
)
from sglang_kvcodec.latency.loads import LOADS, Load
from sglang_kvcodec.latency.rows import Found
from sglang_kvcodec.latency.samples import PREFILL, Method
from sglang_kvcodec.latency.servers import bits_per_s_of
from sglang_kvcodec.latency.sglang_serving import ServingLoad
from sglang_kvcodec.latency.sweep import AS_IS, SweepPlan
from sglang_kvcodec.testing.sglang_client import SGLangClient

_BANDWIDTHS = "10Mbps,30Mbps,100Mbps,300Mbps,1Gbps,unlimited"
_PROFILES = "raw,exact,high"
_COLUMNS = {
    "bandwidth": "bandwidth",
    "method": "method",
    "ttft_s_median": "TTFT s",
    "ttft_s_p10": "p10",
    "ttft_s_p90": "p90",
    "ratio_to_prefill_median": "of prefill",
    "over_best_median": "of best",
    "prompt_tokens_median": "prompt",
    "cached_device_tokens_median": "device",
    "cached_host_tokens_median": "host",
    "cached_storage_tokens_median": "storage",
    "fetched_bytes_median": "bytes",
    "compression_ratio": "ratio",
    "same_words": "same words",
    "reasons": "planned",
}
_SERVING_COLUMNS = {
    "bandwidth": "bandwidth",
    "method": "method",
    "completed": "requests",
    "mean_ttft_ms": "mean TTFT ms",
    "median_ttft_ms": "median",
    "p99_ttft_ms": "p99",
    "requests_per_s": "requests/s",
    "output_tokens_per_s": "output tokens/s",
    "tokens_per_s": "tokens/s",
    "cached_storage_tokens": "storage",
}


def add_parser(benches: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``ttft`` to ``bench``."""
    parser = benches.add_parser(
        "ttft",
        help="time to the first token against bandwidth, on real SGLang servers",
        description="Starts a peer and SGLang servers, or takes two that run, and measures the time to the first token "
        "of prompts whose prefix is stored: computed, fetched in each tier, and as the planner decides. Writes "
        "ttft.json, ttft.csv, ttft.svg, the planner's trace.json, and one of its requests as gantt.svg. Exits with 1 "
        "where a lossless tier has not said what the server without kvcodec says.",
    )
    servers = parser.add_argument_group("servers")
    servers.add_argument("--model", metavar="M", help="path or hub name, for servers of its own")
    servers.add_argument("--server", metavar="URL", help="a server with kvcodec that runs; its cache is flushed")
    servers.add_argument("--baseline", metavar="URL", help="beside --server: one without kvcodec; likewise")
    servers.add_argument(
        "--bandwidth",
        metavar="A,B",
        help=f"of the peer, such as 100Mbps, or unlimited (default: {_BANDWIDTHS}). With --server the link is as it is",
    )
    servers.add_argument(
        "--profile", metavar="A,B", help=f"tiers to measure (default: {_PROFILES}); with --server what that one has"
    )
    servers.add_argument(
        "--planner-profile",
        metavar="A,B",
        help="of the server that plans (default: all calibrated tiers of --profile, or its last one)",
    )
    servers.add_argument(
        "--calibration",
        metavar="FILE",
        nargs="+",
        type=pathlib.Path,
        default=[],
        help="of kvcodec calibrate, one of each rank; without one high, balanced and compact are uncalibrated",
    )
    servers.add_argument("--capacity", metavar="SIZE", default="4GB", help="of the peer (default: %(default)s)")
    servers.add_argument("--server-args", metavar="ARGS", default="", help="more for every server: one quoted string")
    servers.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="one server after another, where the model has no room for all side by side",
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--load",
        choices=LOADS,
        default=LOADS[0],
        help="questions about a long text, or the next turn of a conversation (default: %(default)s)",
    )
    load.add_argument("--prefix-tokens", metavar="N", type=int, default=2000, help="stored (default: %(default)s)")
    load.add_argument("--turns", metavar="N", type=int, default=4, help="of a conversation (default: %(default)s)")
    load.add_argument("--answer-tokens", metavar="N", type=int, default=16, help="(default: %(default)s)")
    load.add_argument("--repeats", metavar="N", type=int, default=5, help="prompts (default: %(default)s)")
    load.add_argument(
        "--settle",
        metavar="N",
        type=int,
        default=3,
        help="questions to the planner at each bandwidth before it is measured (default: %(default)s)",
    )
    serving = parser.add_argument_group("SGLang's load generator")
    serving.add_argument(
        "--serving", action="store_true", help="also drive the servers by python -m sglang.benchmark.serving"
    )
    serving.add_argument("--serving-prefixes", metavar="N", type=int, default=8, help="(default: %(default)s)")
    serving.add_argument("--serving-concurrency", metavar="N", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path, help="write results there")
    parser.add_argument("--no-picture", action="store_true", help="do without pictures, and without matplotlib")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    """Measures; 0 when done, 1 when a server failed or a lossless tier said something else, 130 when interrupted.

    Raises:
        KVCodecError: it can't be measured as asked.
    """
    plan = _plan(arguments)
    _check_servers_asked_for(arguments)
    if arguments.out and not arguments.no_picture:
        check_can_draw()
    out = prepare_out(arguments.out)
    bar = ProgressBar()
    work_dir = pathlib.Path(tempfile.mkdtemp(prefix="kvcodec-bench-"))
    is_done = False
    try:
        with _ended_by_sigterm():
            status = _measure(arguments, plan, work_dir, out, bar)
        is_done = True
    except KVCodecError:
        raise
    except (OSError, RuntimeError) as error:
        bar.close()
        print(f"kvcodec: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        bar.close()
        print("kvcodec: interrupted", file=sys.stderr)
        return 130
    finally:
        bar.close()
        shutil.rmtree(work_dir / "store", ignore_errors=True)
        if is_done:
            shutil.rmtree(work_dir)
        elif any(work_dir.iterdir()):
            print(f"logs are in {work_dir}", file=sys.stderr)
        else:
            work_dir.rmdir()
    return status


def _measure(
    arguments: argparse.Namespace,
    plan: SweepPlan,
    work_dir: pathlib.Path,
    out: pathlib.Path | None,
    bar: ProgressBar,
) -> int:
    load_before = os.getloadavg()[0]
    trace = (out or work_dir).resolve() / "trace.json"
    if arguments.server:
        methods = [Method(PREFILL), Method(arguments.profile or "server", arguments.profile or "", "")]
        server, baseline = SGLangClient(arguments.server), SGLangClient(arguments.baseline)
        check_servers(server, baseline)
        model = arguments.model or server.model_path()
        sweep, serving = run_on_servers(
            (methods[1], server), baseline, plan, _serving(arguments, model, plan), work_dir, bar, bar.say
        )
    else:
        model = arguments.model
        profiles = _profiles(arguments)
        methods = methods_of(profiles, _planner_profile(arguments, profiles))
        groups = [[method] for method in methods] if arguments.one_at_a_time else [methods]
        site = Site(
            model,
            work_dir,
            arguments.capacity,
            trace,
            tuple(shlex.split(arguments.server_args)),
            tuple(_read(path) for path in arguments.calibration),
        )
        sweep, serving = run_on_own_servers(site, groups, plan, _serving(arguments, model, plan), bar, bar.say)
    bar.close()
    found = Found(sweep.samples, methods)
    configuration = _configuration(arguments, plan, model, methods) | {
        "load_average_before": round(load_before, 2),
        "load_average_after": round(os.getloadavg()[0], 2),
    }
    return _report(arguments, found, results.document(found, sweep.samples, serving, configuration), trace, out)


def _report(
    arguments: argparse.Namespace, found: Found, result: dict[str, Any], trace: pathlib.Path, out: pathlib.Path | None
) -> int:
    """Prints and writes what was found; the exit status."""
    print(table(result["rows"], _COLUMNS))
    for row in result["rows"]:
        if row["plan"] == "always" and not row["cached_storage_tokens_median"]:
            print(f"{row['method']} at {row['bandwidth']}: nothing came in time, so that this is its prefill")
    for bandwidth, ratio in result["planner_over_best"].items():
        print(f"planner over the best of the others at {bandwidth}: {ratio:.2f}")
    if result["serving"]:
        print("python -m sglang.benchmark.serving:")
        print(table(result["serving"], _SERVING_COLUMNS))
    _tell_words(found)
    if out:
        files = results.write(out, result, with_picture=not arguments.no_picture)
        rid = found.worth_a_picture()
        if rid is not None:
            files.append(trace)
            if not arguments.no_picture:
                try:
                    files.append(results.draw_request(out, trace, rid))
                except KVCodecError as error:
                    print(f"no gantt.svg: {error}", file=sys.stderr)
        print(f"written to {out}: {', '.join(path.name for path in files)}")
    for words in result["broken_words"]:
        print(f"kvcodec: not the words of the server without kvcodec: {words}", file=sys.stderr)
    return 1 if result["broken_words"] else 0


def _tell_words(found: Found) -> None:
    for name in found.names():
        method = found.method_of(name)
        if not method.has_kvcodec:
            continue
        samples = [sample for bandwidth in found.bandwidths for sample in found.samples_of(bandwidth, name)]
        same = sum(not found.difference(sample) for sample in samples)
        kind = "lossless" if method.is_lossless else "lossy" if method.profile else "of an unknown tier"
        print(f"{name} ({kind}): {same} of {len(samples)} answers are those of the server without kvcodec")


def _plan(arguments: argparse.Namespace) -> SweepPlan:
    least = {"--prefix-tokens": 64, "--turns": 2, "--answer-tokens": 1, "--repeats": 1, "--settle": 0}
    least |= {"--serving-prefixes": 1, "--serving-concurrency": 1}
    for option, smallest in least.items():
        if getattr(arguments, option.removeprefix("--").replace("-", "_")) < smallest:
            raise ConfigurationError(f"{option} must be at least {smallest}")
    parse_bytes(arguments.capacity)
    load = Load(arguments.load, arguments.prefix_tokens, arguments.turns, arguments.answer_tokens)
    if arguments.server:
        if arguments.bandwidth:
            raise ConfigurationError("--bandwidth shapes a peer of its own; the link of --server is measured as it is")
        return SweepPlan(load, (AS_IS,), arguments.repeats, arguments.settle)
    bandwidths = tuple(name.strip() for name in (arguments.bandwidth or _BANDWIDTHS).split(","))
    for bandwidth in bandwidths:
        bits_per_s_of(bandwidth)
    if len(set(bandwidths)) < len(bandwidths):
        raise ConfigurationError(f"--bandwidth {arguments.bandwidth}: one is there twice")
    return SweepPlan(load, bandwidths, arguments.repeats, arguments.settle)


def _check_servers_asked_for(arguments: argparse.Namespace) -> None:
    if bool(arguments.server) != bool(arguments.baseline):
        raise ConfigurationError("--server and --baseline go together: a ratio needs both from one run")
    if arguments.server:
        own = ("planner_profile", "calibration", "server_args", "one_at_a_time")
        for option in own:
            if getattr(arguments, option):
                raise ConfigurationError(f"--{option.replace('_', '-')} is for servers of its own, not for --server")
        if arguments.profile:
            _check_profile(arguments.profile)
    elif not arguments.model:
        raise ConfigurationError("--model is needed, or --server and --baseline")
    else:
        _planner_profile(arguments, _profiles(arguments))
        if arguments.model.startswith(("/", ".")) and not os.path.exists(arguments.model):
            raise ConfigurationError(f"there is no model at {arguments.model}")
    if (not arguments.server or arguments.serving) and importlib.util.find_spec("sglang") is None:
        raise ConfigurationError('this needs SGLang: pip install "sglang-kvcodec[sglang]"')


def _profiles(arguments: argparse.Namespace) -> list[str]:
    profiles = [name.strip() for name in (arguments.profile or _PROFILES).split(",")]
    unknown = [name for name in profiles if name not in PROFILES]
    if unknown:
        raise ConfigurationError(f"--profile: unknown {', '.join(unknown)}; there are {', '.join(PROFILES)}")
    return list(dict.fromkeys(profiles))


def _planner_profile(arguments: argparse.Namespace, profiles: list[str]) -> str:
    if arguments.planner_profile:
        _check_profile(arguments.planner_profile)
        return str(arguments.planner_profile)
    return ",".join(name for name in profiles if name in CALIBRATED_TIERS) or profiles[-1]


def _check_profile(profile: str) -> None:
    """As a server would check it, before one is started."""
    ServerConfig(remote="grpc://127.0.0.1:1", profile=profile)


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"can't read {path}: {error.strerror}") from error


def _serving(arguments: argparse.Namespace, model: str, plan: SweepPlan) -> ServingLoad | None:
    if not arguments.serving:
        return None
    return ServingLoad(model, plan.load, arguments.serving_prefixes, arguments.serving_concurrency)


def _configuration(arguments: argparse.Namespace, plan: SweepPlan, model: str, methods: list[Method]) -> dict[str, Any]:
    return {
        "model": pathlib.PurePath(model).name,
        "load": plan.load.kind,
        "prefix_tokens": plan.load.prefix_tokens,
        "turns": plan.load.turns if plan.load.kind == "multi-turn" else None,
        "answer_tokens": plan.load.answer_tokens,
        "repeats": plan.repeats,
        "settle": plan.settle,
        "methods": {method.name: f"{method.profile} {method.plan}".strip() for method in methods},
        "calibrated": bool(arguments.calibration) if not arguments.server else None,
        "side_by_side": not arguments.one_at_a_time,
        "server_args": arguments.server_args,
        "shaping": None if arguments.server else "token bucket in the peer",
        "serving_prefixes": arguments.serving_prefixes if arguments.serving else None,
        "serving_concurrency": arguments.serving_concurrency if arguments.serving else None,
    }


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what was started, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
