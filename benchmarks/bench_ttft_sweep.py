"""TTFT against bandwidth: prefill, every profile with every hit taken, and a server that plans, on real servers.

The set-up is that of ``bench_ttft``: one peer whose fetches are shaped by a token bucket and that is started anew for
each bandwidth, servers side by side, a text of its own for each round. Every profile's server takes every hit
(``--kvcodec-plan always``). The planning server (``auto``) has the profile ``--planner-profile``; after each change of
bandwidth it is asked ``--settle`` times before it is measured, the first of which is kept as ``planner_first``: what a
request costs that comes before the change is known.

Beside each TTFT stand its ratios to prefill and to the best of all the others of the same round, which is what an
oracle would have chosen among them. Writes JSON and a picture into ``benchmarks/results``.

python -m benchmarks.bench_ttft_sweep [--rounds 7] [--prompt-tokens 2000] [--bandwidths 10Mbps 100Mbps unlimited]
"""

from __future__ import annotations

import pathlib
import re
import statistics
import time
import urllib.request
from collections import defaultdict
from collections.abc import Mapping, Sequence

from benchmarks.bench_ttft import ANSWER_TOKENS, Peer, hit
from benchmarks.record import record
from benchmarks.serving import Lab, ask, forget, load_average, parse, parser_of, prompts, rotated, spread
from sglang_kvcodec.config import PROFILES, parse_bits_per_s
from sglang_kvcodec.testing.processes import KVCodecArgs, SGLangProcess

BANDWIDTHS = ("10Mbps", "30Mbps", "100Mbps", "300Mbps", "1Gbps", "unlimited")
SETTLE_S = 2.0
"""Between two questions while the planner settles: as long as it takes what it knows of a link to get old."""


def plans(server: SGLangProcess) -> dict[str, float]:
    """What a server has planned so far, by reason."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        found = re.findall(r'^kvcodec_plans_total{.*?reason="(\w+)".*?} (\S+)$', response.read().decode(), re.MULTILINE)
    totals: dict[str, float] = defaultdict(float)
    for reason, value in found:
        totals[reason] += float(value)
    return totals


def planned_hit(server: SGLangProcess, text: str) -> dict:
    """As ``hit``, with the reason of its plan."""
    before = plans(server)
    sample = hit(server, text)
    reasons = [reason for reason, value in plans(server).items() if value > before.get(reason, 0)]
    return sample | {"reason": "+".join(sorted(reasons)) or "none"}


def measure(options, bandwidth: str, text: str, plain, servers: Mapping[str, SGLangProcess], number: int) -> dict:
    """One round at one bandwidth: ``what -> sample``."""
    samples = {}
    for what in rotated(["prefill", *servers], number):
        if what == "prefill":
            plain.client.flush_cache()
            samples["prefill"] = {"reply": ask(plain, text, ANSWER_TOKENS)}
            samples["device"] = {"reply": ask(plain, text, ANSWER_TOKENS)}
        elif what == "planner":
            for again in range(options.settle):
                first = planned_hit(servers[what], text)
                samples.setdefault("planner_first", first)
                if again + 1 < options.settle:
                    time.sleep(SETTLE_S)
            samples[what] = planned_hit(servers[what], text)
        else:
            samples[what] = hit(servers[what], text)
    ttfts = {what: round(sample["reply"].ttft_s, 3) for what, sample in samples.items()}
    print(f"round {number} {bandwidth:9} {ttfts} planner: {samples['planner']['reason']}", flush=True)
    return samples


def rows_of(rounds: Mapping[str, Sequence[Mapping[str, dict]]], common: dict) -> list[dict]:
    """One row for each bandwidth and each way."""
    rows = []
    for bandwidth, samples in rounds.items():
        for what in samples[0]:
            runs = [sample[what] for sample in samples]
            ttfts_s = [run["reply"].ttft_s for run in runs]
            rivals = [
                min(
                    sample[other]["reply"].ttft_s
                    for other in sample
                    if other not in (what, "device", "planner", "planner_first")
                )
                for sample in samples
            ]
            row = {
                "what": what,
                "bandwidth": bandwidth,
                "bits_per_s": None if bandwidth == "unlimited" else parse_bits_per_s(bandwidth),
                "rounds": len(runs),
                **spread("ttft_s", ttfts_s),
                "prompt_tokens_median": statistics.median(run["reply"].prompt_tokens for run in runs),
                "cached_storage_tokens_median": statistics.median(run["reply"].cached.storage for run in runs),
                "ratio_to_prefill_median": _ratio(ttfts_s, [sample["prefill"]["reply"].ttft_s for sample in samples]),
                "ratio_to_best_other_median": _ratio(ttfts_s, rivals),
                "answers_as_prefill": sum(
                    run["reply"].text == sample["prefill"]["reply"].text
                    for run, sample in zip(runs, samples, strict=True)
                ),
            }
            if "fetched_bytes" in runs[0]:
                row["fetched_bytes_median"] = statistics.median(run["fetched_bytes"] for run in runs)
            if "reason" in runs[0]:
                row["reasons"] = [run["reason"] for run in runs]
            rows.append(row | common)
    return rows


def _ratio(values: Sequence[float], others: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(values, others, strict=True)), 3)


def draw(rows: Sequence[dict], path: pathlib.Path) -> None:
    """TTFT against bandwidth, a line for each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    bandwidths = list(dict.fromkeys(row["bandwidth"] for row in rows))
    for what in dict.fromkeys(row["what"] for row in rows):
        of_it = [row for row in rows if row["what"] == what]
        places = [bandwidths.index(row["bandwidth"]) for row in of_it]
        style = {"linewidth": 2.5, "color": "black"} if what == "planner" else {"linewidth": 1.2}
        if what in ("prefill", "device", "planner_first"):
            style["linestyle"] = "--"
        axes.plot(places, [row["ttft_s_median"] for row in of_it], marker="o", markersize=3, label=what, **style)
        axes.fill_between(places, [row["ttft_s_p10"] for row in of_it], [row["ttft_s_p90"] for row in of_it], alpha=0.1)
    axes.set_xticks(range(len(bandwidths)), bandwidths)
    axes.set_yscale("log")
    axes.set_xlabel("bandwidth of the peer")
    axes.set_ylabel("time to first token, s (median, 10th to 90th percentile)")
    axes.set_title(f"{rows[0]['model']}, {rows[0]['prompt_tokens_median']:.0f} tokens")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = parser_of(__doc__, rounds=7)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--profiles", nargs="+", default=["raw", "exact", "high"], choices=PROFILES)
    parser.add_argument("--planner-profile", default="exact", choices=PROFILES)
    parser.add_argument("--bandwidths", nargs="+", default=list(BANDWIDTHS), help="unlimited, or as 100Mbps")
    parser.add_argument("--settle", type=int, default=3, help="questions to the planner before it is measured")
    parser.add_argument("--picture", type=pathlib.Path, help="where to draw it, .svg or .png, without a result as well")
    options = parse(parser)
    texts = prompts(options.model, options.prompt_tokens)
    load_before = load_average()
    rounds: dict[str, list[dict]] = defaultdict(list)
    with Lab(options.model) as lab:
        peer = Peer(lab)
        try:
            peer.start("unlimited", [])
            among = len(options.profiles) + 2
            plain = lab.start_server("plain", None, among)
            servers = {
                profile: lab.start_server(profile, KVCodecArgs(peer.remote, profile), among)
                for profile in options.profiles
            }
            servers["planner"] = lab.start_server(
                "planner", KVCodecArgs(peer.remote, options.planner_profile, plan="auto"), among
            )
            for number in range(options.rounds + 1):
                text = next(texts)
                for server in servers.values():
                    forget(server)
                    ask(server, text, ANSWER_TOKENS)
                    if not server.client.wait_published(timeout_s=120):
                        raise RuntimeError(f"{server.name} has not published a fresh text")
                # The first round warms up, and is not kept.
                for bandwidth in rotated(options.bandwidths, number) if number else options.bandwidths[-1:]:
                    peer.start(bandwidth, list(servers.values()))
                    samples = measure(options, bandwidth, text, plain, servers, number)
                    if number:
                        rounds[bandwidth].append(samples)
        finally:
            peer.stop()
    common = {
        "model": options.model.rpartition("/")[2],
        "planner_profile": options.planner_profile,
        "answer_tokens": ANSWER_TOKENS,
        "shaping": "token bucket in the peer",
        "load_average_before": load_before,
        "load_average_after": load_average(),
    }
    rows = rows_of({bandwidth: rounds[bandwidth] for bandwidth in options.bandwidths}, common)
    for row in rows:
        print(
            f"{row['bandwidth']:9} {row['what']:13} TTFT {row['ttft_s_median']:.3f} s; "
            f"{row['ratio_to_prefill_median']:.2f} of prefill, "
            f"{row['ratio_to_best_other_median']:.2f} of the best other"
        )
    picture = options.picture
    if not options.dry:
        path = record("ttft-sweep", rows)
        print(path)
        picture = picture or path.with_suffix(".svg")
    if picture is not None:
        draw(rows, picture)
        print(picture)


if __name__ == "__main__":
    main()
