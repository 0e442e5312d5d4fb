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

import json
import pathlib
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from benchmarks.bench_ttft import ANSWER_TOKENS, Peer, hit
from benchmarks.record import record
from benchmarks.serving import Lab, ask, forget, load_average, parse, parser_of, prompts, rotated, spread, wait_for
from sglang_kvcodec.config import PROFILES
from sglang_kvcodec.testing.processes import KVCodecArgs

BANDWIDTHS = ("30Mbps", "50Mbps", "100Mbps", "300Mbps", "unlimited")
WAYS = ("early", "landed")


class Trace:
    """The trace of a server, read as it is written."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._position = 0

    def events(self) -> list[dict]:
        """What was written since the last call."""
        with self.path.open() as file:
            file.seek(self._position)
            text = file.read()
        whole, _, _ = text.rpartition("\n")
        self._position += len(whole)
        lines = (line.strip().lstrip("[").rstrip(",]") for line in whole.splitlines())
        return [json.loads(line) for line in lines if line]


def durations_of(events: Sequence[dict]) -> dict[str, float]:
    """Seconds of the newest request's spans by name; of several of one name the sum. Also when it was promised."""
    rids = [event["id"] for event in events if event["ph"] == "b" and event["name"] == "first token"]
    found: dict[str, float] = defaultdict(float)
    begun: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("id") != rids[-1]:
            continue
        if event["ph"] == "b":
            begun[event["name"]].append(event["ts"])
        elif event["ph"] == "e":
            found[event["name"]] += (event["ts"] - begun[event["name"]].pop(0)) / 1e6
    return dict(found)


def measure(server, trace: Trace, text: str) -> dict:
    """One request whose prefix only the peer has."""
    trace.events()
    sample = hit(server, text)
    events: list[dict] = []

    def has_come() -> bool:
        events.extend(trace.events())
        return any(event["name"] == "first token" and event["ph"] == "e" for event in events)

    wait_for(has_come, f"trace of {server.name}")
    return sample | {"spans": durations_of(events)}


def rows_of(rounds: Mapping[str, Sequence[Mapping[str, dict]]], common: dict) -> list[dict]:
    rows = []
    for bandwidth, samples in rounds.items():
        for way in WAYS:
            ttfts_s = [sample[way]["reply"].ttft_s for sample in samples]
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
                            sample[way]["reply"].ttft_s / sample["landed"]["reply"].ttft_s for sample in samples
                        ),
                        3,
                    ),
                    "over_longest_median": round(
                        statistics.median(t / longest for t, longest in zip(ttfts_s, longest_s, strict=True)), 3
                    ),
                    **{f"{name}_median": round(statistics.median(values), 4) for name, values in stages.items()},
                    "fetched_bytes_median": statistics.median(sample[way]["fetched_bytes"] for sample in samples),
                    "promised_rounds": sum("promise" in span for span in spans),
                    "cached_storage_tokens_median": statistics.median(
                        sample[way]["reply"].cached.storage for sample in samples
                    ),
                    "same_words": sum(sample[way]["reply"].text == sample["text"] for sample in samples),
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
        peer = Peer(lab)
        try:
            peer.start("unlimited", [])
            servers, traces = {}, {}
            for way in WAYS:
                traces[way] = Trace(lab.work_dir / f"{way}-trace.json")
                extra = ("--kvcodec-admit", way, "--kvcodec-trace", str(traces[way].path))
                servers[way] = lab.start_server(way, KVCodecArgs(peer.remote, options.profile, extra), len(WAYS))
            for number in range(options.rounds + 1):
                text = next(texts)
                for server in servers.values():
                    forget(server)
                    answer = ask(server, text, ANSWER_TOKENS).text
                    if not server.client.wait_published(timeout_s=120):
                        raise RuntimeError(f"{server.name} has not published a fresh text")
                # The first round warms up, and is not kept.
                for bandwidth in rotated(options.bandwidths, number) if number else options.bandwidths[-1:]:
                    peer.start(bandwidth, list(servers.values()))
                    sample = {way: measure(servers[way], traces[way], text) for way in rotated(WAYS, number)} | {
                        "text": answer
                    }
                    shown = {
                        way: (round(sample[way]["reply"].ttft_s, 3), sample[way]["reply"].cached.storage)
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
