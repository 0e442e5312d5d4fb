"""What it gains that a request is admitted while its last pages are on their way, on real servers side by side.

Two servers of one profile take every hit (``--kvcodec-plan always``): ``early`` admits a request when what is missing
will be in time, ``landed`` when all its pages are in host memory. The peer's fetches are shaped by a token bucket. Each
round has a text of its own, which both servers have computed and one has published; order changes from round to round.

From the servers' traces come the time that the bytes of a request were on the wire, and, where nothing waited for the
network (the same round's ``landed``), what its restore took and the forward pass apart from it. ``over_longest`` is
TTFT over the longest of the three, which is what no overlap can beat.

python -m benchmarks.bench_overlap [--rounds 7] [--prompt-tokens 2000] [--bandwidths 30Mbps 100Mbps unlimited]
"""

from __future__ import annotations

import pathlib
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from benchmarks.record import record
from benchmarks.serving import ask, load_average, parse, parser_of, prompts
from sglang_kvcodec.config import PROFILES
from sglang_kvcodec.latency.rows import spread
from sglang_kvcodec.latency.samples import hit
from sglang_kvcodec.latency.servers import Lab, ShapedPeer, wait_for
from sglang_kvcodec.latency.sweep import rotated
from sglang_kvcodec.latency.trace_file import Span, read_trace
from sglang_kvcodec.testing.processes import KVCodecArgs

BANDWIDTHS = ("30Mbps", "50Mbps", "100Mbps", "300Mbps", "unlimited")
WAYS = ("early", "landed")
ANSWER_TOKENS = 8


def measure(server, trace: pathlib.Path, text: str) -> dict:
    """One request whose prefix only the peer has, with the seconds of its spans by name."""
    sample = hit(server.client, [{"role": "user", "content": text}], ANSWER_TOKENS)
    spans: list[Span] = []

    def has_come() -> bool:
        spans[:] = read_trace(trace).requests.get(sample.reply.rid, [])
        return any(span.name == "first token" for span in spans)

    wait_for(has_come, f"trace of {server.name}")
    durations_s: dict[str, float] = defaultdict(float)
    for span in spans:
        durations_s[span.name] += span.duration_s
    return {"hit": sample, "spans": dict(durations_s)}


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
                "forward_s": [max(0.0, span.get("forward", 0.0) - span.get("restore", 0.0)) for span in landed],
            }
            longest_s = [max(values) for values in zip(*stages.values(), strict=True)]
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
                    "over_longest_median": round(
                        statistics.median(t / longest for t, longest in zip(ttfts_s, longest_s, strict=True)), 3
                    ),
                    **{f"{name}_median": round(statistics.median(values), 4) for name, values in stages.items()},
                    "fetched_bytes_median": statistics.median(sample[way]["hit"].fetched_bytes for sample in samples),
                    "promised_rounds": sum("promise" in span for span in spans),
                    "cached_storage_tokens_median": statistics.median(
                        sample[way]["hit"].reply.cached.storage for sample in samples
                    ),
                    "same_words": sum(sample[way]["hit"].reply.text == sample["text"] for sample in samples),
                }
                | common
            )
    return rows


def main() -> None:
    parser = parser_of(__doc__, rounds=7)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--profile", default="exact", choices=PROFILES)
    parser.add_argument("--bandwidths", nargs="+", default=list(BANDWIDTHS), help="unlimited, or as 100Mbps")
    options = parse(parser)
    texts = prompts(options.model, options.prompt_tokens)
    load_before = load_average()
    rounds: dict[str, list[dict]] = defaultdict(list)
    with Lab(options.model) as lab:
        peer = ShapedPeer(lab.work_dir / "store")
        try:
            peer.start("unlimited")
            servers, traces = {}, {}
            for way in WAYS:
                traces[way] = lab.work_dir / f"{way}-trace.json"
                extra = ("--kvcodec-admit", way, "--kvcodec-trace", str(traces[way]))
                servers[way] = lab.start_server(way, KVCodecArgs(peer.remote, options.profile, extra), len(WAYS))
            for number in range(options.rounds + 1):
                text = next(texts)
                for server in servers.values():
                    server.client.forget()
                    answer = ask(server, text, ANSWER_TOKENS).text
                    if not server.client.wait_published(timeout_s=120):
                        raise RuntimeError(f"{server.name} has not published a fresh text")
                # The first round warms up, and is not kept.
                for bandwidth in rotated(options.bandwidths, number) if number else options.bandwidths[-1:]:
                    peer.start(bandwidth, [server.client for server in servers.values()])
                    sample = {way: measure(servers[way], traces[way], text) for way in rotated(WAYS, number)} | {
                        "text": answer
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
        "profile": options.profile,
        "answer_tokens": ANSWER_TOKENS,
        "shaping": "token bucket in the peer",
        "load_average_before": load_before,
        "load_average_after": load_average(),
    }
    rows = rows_of({bandwidth: rounds[bandwidth] for bandwidth in options.bandwidths}, common)
    for row in rows:
        print(
            f"{row['bandwidth']:9} {row['way']:7} TTFT {row['ttft_s_median']:.3f} s; "
            f"{row['ratio_to_landed_median']:.2f} of landed, {row['over_longest_median']:.2f} of the longest stage "
            f"(wire {row['wire_s_median']:.2f}, restore {row['restore_s_median']:.2f} s)"
        )
    if not options.dry:
        print(record("overlap", rows))


if __name__ == "__main__":
    main()
