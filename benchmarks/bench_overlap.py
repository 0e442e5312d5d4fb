"""What it gains that a request is admitted while its last pages are on their way, on real servers side by side.

Two servers of one profile take every hit (``--kvcodec-plan always``): ``early`` admits a request when what is missing
will be in time, ``landed`` when all its pages are in host memory. The peer's fetches are shaped by a token bucket. Each
round has a text of its own, which both servers have computed and one has published; order changes from round to round.

From the servers' traces come the time that the bytes of a request were on the wire, and what its restore took where it
did not wait for the network (the same round's ``landed``); computing takes what the same request does with all of it in
the server's own pool. ``over_longest`` is TTFT over the longest of the three, which is what no overlap can beat. What
overlap must leave is the last layer group's restore and forward pass: half of all with a model of six layers, an eighth
with ``--layers 24``, which are those of the model four times over.

Without a GPU decoding and computing share cores: ``cpu_over_cores`` is the server's CPU time up to the first token over
the machine's cores, and ``over_bound`` is TTFT over the longest of all four: no scheduling of the same work on this
machine is faster than 1. With ``--separate`` the model has a core of its own and all else the others.

A measured request is for one token; that its KV was restored right is seen by the words of the next request for it.

python -m benchmarks.bench_overlap [--rounds 7] [--prompt-tokens 2000] [--bandwidths 30Mbps unlimited] [--layers 24]
    [--separate]
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence

from benchmarks.deeper import deepened
from benchmarks.record import record
from benchmarks.serving import Places, ask, cpu_s, load_average, over, parse, parser_of, prompts
from sglang_kvcodec.config import PROFILES
from sglang_kvcodec.latency.rows import spread
from sglang_kvcodec.latency.samples import hit
from sglang_kvcodec.latency.servers import Lab, ShapedPeer, wait_for
from sglang_kvcodec.latency.sweep import rotated
from sglang_kvcodec.latency.trace_file import Span, read_trace
from sglang_kvcodec.testing.processes import KVCodecArgs, SGLangProcess
from sglang_kvcodec.testing.sglang_client import ChatReply, Message, SGLangClient

BANDWIDTHS = ("30Mbps", "50Mbps", "100Mbps", "300Mbps", "unlimited")
WAYS = ("early", "landed")
ANSWER_TOKENS = 8


class CpuClient(SGLangClient):
    """Notes what a request takes of a server's CPU time, up to the end of its reply: an idle scheduler takes some."""

    def __init__(self, server: SGLangProcess) -> None:
        super().__init__(server.url)
        self._server = server
        self.took_s = 0.0

    def chat(
        self, messages: Sequence[Message], max_tokens: int, extra: Mapping[str, object] | None = None
    ) -> ChatReply:
        before_s = cpu_s(self._server)
        reply = super().chat(messages, max_tokens, extra)
        self.took_s = cpu_s(self._server) - before_s
        return reply


def measure(server: SGLangProcess, trace: pathlib.Path, text: str) -> dict:
    """One request whose prefix only the peer has, with the seconds of its spans by name."""
    client = CpuClient(server)
    sample = hit(client, [{"role": "user", "content": text}], 1)
    words = ask(server, text, ANSWER_TOKENS).text
    spans: list[Span] = []

    def has_come() -> bool:
        spans[:] = read_trace(trace).requests.get(sample.reply.rid, [])
        return any(span.name == "first token" for span in spans)

    wait_for(has_come, f"trace of {server.name}")
    durations_s: dict[str, float] = defaultdict(float)
    for span in spans:
        durations_s[span.name] += span.duration_s
    return {"hit": sample, "spans": dict(durations_s), "cpu_s": client.took_s, "words": words}


def rows_of(rounds: Mapping[str, Sequence[Mapping[str, dict]]], common: dict) -> list[dict]:
    rows = []
    for bandwidth, samples in rounds.items():
        for way in WAYS:
            ttfts_s = [sample[way]["hit"].reply.ttft_s for sample in samples]
            spans = [sample[way]["spans"] for sample in samples]
            landed = [sample["landed"]["spans"] for sample in samples]
            stages = {
                "wire_s": [span.get("wire", 0.0) for span in spans],
                "restore_s": [span.get("restore", 0.0) for span in landed],
                "compute_s": [sample["device_ttft_s"] for sample in samples],
            }
            longest_s = [max(values) for values in zip(*stages.values(), strict=True)]
            cpu_over_cores_s = [sample[way]["cpu_s"] / (os.cpu_count() or 1) for sample in samples]
            bounds_s = [max(values) for values in zip(longest_s, cpu_over_cores_s, strict=True)]
            rows.append(
                {
                    "way": way,
                    "bandwidth": bandwidth,
                    "rounds": len(samples),
                    **spread("ttft_s", ttfts_s),
                    "ratio_to_landed_median": round(
                        statistics.median(
                            sample[way]["hit"].reply.ttft_s / sample["landed"]["hit"].reply.ttft_s for sample in samples
                        ),
                        3,
                    ),
                    "over_longest_median": over(ttfts_s, longest_s),
                    "over_bound_median": over(ttfts_s, bounds_s),
                    **{f"{name}_median": round(statistics.median(values), 4) for name, values in stages.items()},
                    "cpu_over_cores_s_median": round(statistics.median(cpu_over_cores_s), 3),
                    "fetched_bytes_median": statistics.median(sample[way]["hit"].fetched_bytes for sample in samples),
                    "promised_rounds": sum("promise" in span for span in spans),
                    "cached_storage_tokens_median": statistics.median(
                        sample[way]["hit"].reply.cached.storage for sample in samples
                    ),
                    "same_words": sum(sample[way]["words"] == sample["text"] for sample in samples),
                }
                | common
            )
    return rows


def main() -> None:
    parser = parser_of(__doc__, rounds=7)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--layers", type=int, help="repeat the model's layers until there are so many")
    parser.add_argument("--profile", default="exact", choices=PROFILES)
    parser.add_argument("--separate", action="store_true", help="the model has a CPU of its own, and so has kvcodec")
    parser.add_argument("--bandwidths", nargs="+", default=list(BANDWIDTHS), help="unlimited, or as 100Mbps")
    options = parse(parser)
    places = Places(options.separate)
    texts = prompts(options.model, options.prompt_tokens)
    load_before = load_average()
    rounds: dict[str, list[dict]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        model = options.model
        if options.layers:
            work_dir = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvcodec-bench-")))
            model = str(deepened(pathlib.Path(model), options.layers, work_dir / "model"))
        lab = stack.enter_context(Lab(model))
        peer = ShapedPeer(lab.work_dir / "store")
        try:
            peer.start("unlimited")
            servers, traces = {}, {}
            for way in WAYS:
                traces[way] = lab.work_dir / f"{way}-trace.json"
                extra = ("--kvcodec-admit", way, "--kvcodec-trace", str(traces[way]), *places.server_args)
                with places.of_the_model():
                    servers[way] = lab.start_server(way, KVCodecArgs(peer.remote, options.profile, extra), len(WAYS))
            for number in range(options.rounds + 1):
                text = next(texts)
                for server in servers.values():
                    server.client.forget()
                    answer = ask(server, text, ANSWER_TOKENS).text
                    if not server.client.wait_published(timeout_s=120):
                        raise RuntimeError(f"{server.name} has not published a fresh text")
                device_ttft_s = ask(server, text, 1).ttft_s
                # The first round warms up, and is not kept.
                for bandwidth in rotated(options.bandwidths, number) if number else options.bandwidths[-1:]:
                    peer.start(bandwidth, [server.client for server in servers.values()])
                    sample = {way: measure(servers[way], traces[way], text) for way in rotated(WAYS, number)} | {
                        "text": answer,
                        "device_ttft_s": device_ttft_s,
                    }
                    shown = {
                        way: (round(sample[way]["hit"].reply.ttft_s, 3), sample[way]["hit"].reply.cached.storage)
                        for way in WAYS
                    }
                    print(f"round {number} {bandwidth:9} {shown}", flush=True)
                    if number:
                        rounds[bandwidth].append(sample)
        finally:
            peer.stop()
    common = {
        "model": options.model.rpartition("/")[2],
        "layers": options.layers or "of the model",
        "profile": options.profile,
        "answer_tokens": ANSWER_TOKENS,
        **places.row(),
        "shaping": "token bucket in the peer",
        "load_average_before": load_before,
        "load_average_after": load_average(),
    }
    rows = rows_of({bandwidth: rounds[bandwidth] for bandwidth in options.bandwidths}, common)
    for row in rows:
        print(
            f"{row['bandwidth']:9} {row['way']:7} TTFT {row['ttft_s_median']:.3f} s; "
            f"{row['ratio_to_landed_median']:.2f} of landed, {row['over_longest_median']:.2f} of the longest stage "
            f"(wire {row['wire_s_median']:.2f}, restore {row['restore_s_median']:.2f}, "
            f"compute {row['compute_s_median']:.2f} s; CPU {row['cpu_over_cores_s_median']:.2f} s on each core), "
            f"{row['over_bound_median']:.2f} of what bounds it"
        )
    if not options.dry:
        print(record("overlap", rows))


if __name__ == "__main__":
    main()
