"""TTFT of a stored prefix against computing it, by profile and bandwidth, on real servers that run side by side.

Each round has a text of its own. Every kvcodec server computes and publishes it once, then, for each bandwidth, the
peer is started anew on the same store with ``--bandwidth-limit`` (a token bucket in the peer: no latency is added and
only what Fetch sends is shaped), every kvcodec server forgets what it holds (device tree and host cache) and is asked
again, and the server without kvcodec computes it with its cache flushed. Order changes from round to round.
``device`` is that server asked once more, with everything in its own KV pool: no fetch can be faster than that.

python -m benchmarks.bench_ttft [--rounds 7] [--prompt-tokens 2000]
"""

from __future__ import annotations

import statistics
from collections import defaultdict

from benchmarks.record import record
from benchmarks.serving import Lab, ask, forget, load_average, parse, parser_of, prompts, rotated, spread, wait_peer
from sglang_kvcodec.config import PROFILES
from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.testing.processes import KVCodecArgs, SGLangProcess, free_port

BANDWIDTHS = ("unlimited", "1Gbps", "100Mbps")
BASELINES = ("prefill", "device")
ANSWER_TOKENS = 8
_COUNTERS = ("fetched_bytes", "restored_bytes", "fetch_seconds_sum", "decode_seconds_sum")


class Peer:
    """A peer at one address on one store, started anew for every bandwidth."""

    def __init__(self, lab: Lab) -> None:
        self._store = f"lmdb:{lab.work_dir / 'store'}"
        self._port = free_port()
        self.remote = f"grpc://127.0.0.1:{self._port}"
        self._process: PeerProcess | None = None

    def start(self, bandwidth: str, servers: list[SGLangProcess]) -> None:
        self.stop()
        for server in servers:
            wait_peer(server, up=False)
        limit = None if bandwidth == "unlimited" else bandwidth
        self._process = PeerProcess(self._store, "4GB", self._port, limit, ("--log-level", "warning"))
        for server in servers:
            wait_peer(server, up=True)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process = None


def hit(server: SGLangProcess, text: str) -> dict:
    """One request whose prefix only the peer has."""
    forget(server)
    before = server.client.metrics()
    reply = ask(server, text, ANSWER_TOKENS)
    after = server.client.metrics()

    def grown(name: str) -> float:
        key = f"kvcodec_{name}" if name.endswith("_sum") else f"kvcodec_{name}_total"
        return after.get(key, 0.0) - before.get(key, 0.0)

    return {"reply": reply, **{name: grown(name) for name in _COUNTERS}}


def measure_round(number: int, text: str, plain: SGLangProcess, servers: dict, peer: Peer, bandwidths) -> dict:
    """``(what, bandwidth) -> list of samples``."""
    samples = defaultdict(list)
    for profile, server in rotated(list(servers.items()), number):
        forget(server)
        computed = ask(server, text, ANSWER_TOKENS)
        if computed.cached.storage or not server.client.wait_published(timeout_s=120):
            raise RuntimeError(f"{profile}: {computed.cached} of a fresh text, or it was not published")
    for bandwidth in rotated(bandwidths, number):
        peer.start(bandwidth, list(servers.values()))
        for what in rotated(["prefill", *servers], number):
            if what == "prefill":
                plain.client.flush_cache()
                for baseline in BASELINES:
                    samples[baseline, bandwidth].append({"reply": ask(plain, text, ANSWER_TOKENS)})
            else:
                samples[what, bandwidth].append(hit(servers[what], text))
        ttfts = {what: round(samples[what, bandwidth][-1]["reply"].ttft_s, 3) for what in BASELINES + tuple(servers)}
        print(f"round {number} {bandwidth:9} {ttfts}", flush=True)
    return samples


def rows_of(samples: dict, bandwidths, profiles, common: dict) -> list[dict]:
    rows = []
    for bandwidth in bandwidths:
        prefill = [sample["reply"] for sample in samples["prefill", bandwidth]]
        device = [sample["reply"] for sample in samples["device", bandwidth]]
        for what in (*BASELINES, *profiles):
            runs = samples[what, bandwidth]
            replies = [run["reply"] for run in runs]
            row = {
                "what": what,
                "bandwidth": bandwidth,
                "rounds": len(runs),
                "prompt_tokens_median": statistics.median(reply.prompt_tokens for reply in replies),
                "cached_device_tokens_median": statistics.median(reply.cached.device for reply in replies),
                "cached_storage_tokens_median": statistics.median(reply.cached.storage for reply in replies),
                **spread("ttft_s", [reply.ttft_s for reply in replies]),
                "ratio_to_prefill_median": ratio(replies, prefill),
                "ratio_to_device_median": ratio(replies, device),
            }
            if what not in BASELINES:
                raw = [sample["reply"] for sample in samples.get(("raw", bandwidth), [])]
                row |= {
                    "ratio_to_raw_median": ratio(replies, raw) if raw else None,
                    "fetched_bytes_median": statistics.median(run["fetched_bytes"] for run in runs),
                    "compression_ratio": round(sum_of(runs, "restored_bytes") / sum_of(runs, "fetched_bytes"), 3),
                    "fetch_s_median": round(statistics.median(run["fetch_seconds_sum"] for run in runs), 4),
                    "decode_thread_s_median": round(statistics.median(run["decode_seconds_sum"] for run in runs), 4),
                    "answers_as_prefill": sum(a.text == b.text for a, b in zip(replies, prefill, strict=True)),
                }
            rows.append(row | common)
    return rows


def ratio(replies, baseline) -> float:
    """Median over rounds of TTFT over the baseline's TTFT in the same round."""
    return round(statistics.median(a.ttft_s / b.ttft_s for a, b in zip(replies, baseline, strict=True)), 3)


def sum_of(runs, name: str) -> float:
    return sum(run[name] for run in runs)


def main() -> None:
    parser = parser_of(__doc__, rounds=7)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), choices=PROFILES)
    parser.add_argument("--bandwidths", nargs="+", default=list(BANDWIDTHS), help="unlimited, or as 100Mbps")
    options = parse(parser)
    texts = prompts(options.model, options.prompt_tokens)
    load_before = load_average()
    samples = defaultdict(list)
    with Lab(options.model) as lab:
        peer = Peer(lab)
        try:
            peer.start("unlimited", [])
            among = len(options.profiles) + 1
            plain = lab.start_server("plain", None, among)
            servers = {
                profile: lab.start_server(profile, KVCodecArgs(peer.remote, profile), among)
                for profile in options.profiles
            }
            measure_round(0, next(texts), plain, servers, peer, ["unlimited"])
            load_warm = load_average()
            for number in range(1, options.rounds + 1):
                for key, found in measure_round(number, next(texts), plain, servers, peer, options.bandwidths).items():
                    samples[key] += found
        finally:
            peer.stop()
    common = {
        "model": options.model.rpartition("/")[2],
        "answer_tokens": ANSWER_TOKENS,
        "shaping": "token bucket in the peer",
        "load_average_before": load_before,
        "load_average_after_warm_up": load_warm,
        "load_average_after": load_average(),
    }
    rows = rows_of(samples, options.bandwidths, options.profiles, common)
    for row in rows:
        megabytes = row.get("fetched_bytes_median", 0) / 1e6
        print(
            f"{row['bandwidth']:9} {row['what']:8} TTFT {row['ttft_s_median']:.3f} s "
            f"({row['ttft_s_p10']:.3f} to {row['ttft_s_p90']:.3f}); {row['ratio_to_prefill_median']:.2f} of prefill, "
            f"{row['ratio_to_device_median']:.2f} of device, {row.get('ratio_to_raw_median') or 0:.2f} of raw; "
            f"{row['cached_storage_tokens_median']:.0f} of {row['prompt_tokens_median']:.0f} tokens fetched, "
            f"{megabytes:.2f} MB"
        )
    if not options.dry:
        print(record("ttft", rows))


if __name__ == "__main__":
    main()
