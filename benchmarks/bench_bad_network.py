"""TTFT of a hit on links that fall to a tenth before or in mid-fetch, jitter or stall for a second, on real servers.

A relay between servers and peer gives the link its shape; before each measured request the link is steady, and the
servers learn it so. ``exact`` takes every hit; ``auto`` plans, gives up and turns round; ``tiers`` does so with
``raw,exact`` side by side. Prefill is that of a server without kvcodec.

``over_oracle``: TTFT over that of the better of prefill and ``exact`` in the same round, which is what one would have
chosen who knew the shape. It could also have fetched a part: that is not counted.

Prompts are computed in passes of 256 tokens, so that fetching pays on the steady link. The answers to them do not hang
on rounding, and so not on where passes end.

python -m benchmarks.bench_bad_network [--rounds 7] [--bandwidth 200Mbps] [--round-trip-ms 30] [--shapes steady]
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from benchmarks.record import record
from benchmarks.serving import ask, load_average, over, parse, parser_of, prompts
from sglang_kvcodec.config import parse_bits_per_s
from sglang_kvcodec.latency.rows import spread
from sglang_kvcodec.latency.samples import hit
from sglang_kvcodec.latency.servers import Lab, ShapedPeer
from sglang_kvcodec.latency.sweep import rotated
from sglang_kvcodec.testing.clear_texts import clear_texts
from sglang_kvcodec.testing.processes import KVCodecArgs
from sglang_kvcodec.testing.shaped_link import Shape, ShapedLink, falls, jitters, stalls, steady

WAYS = {"exact": ("exact", "always"), "auto": ("exact", "auto"), "tiers": ("raw,exact", "auto")}
"""Name -> profiles and plan."""
ANSWER_TOKENS = 8
SHAPES = ("steady", "is at a tenth", "falls to a tenth", "jitters", "stalls for 1 s")
_EVENTS = (
    "fetch_cuts_total",
    "fetches_turned_total",
    "joined_tokens_total",
    "tier_switches_total",
    "early_admissions_total",
)


def shape_of(name: str, bytes_per_s: float, fetched_bytes: float, number: int) -> Shape:
    """``fetched_bytes`` of the whole prefix: what happens, happens in its middle."""
    middle = int(fetched_bytes / 2)
    made: Mapping[str, Callable[[], Shape]] = {
        "steady": lambda: steady(bytes_per_s),
        "is at a tenth": lambda: steady(bytes_per_s / 10),
        "falls to a tenth": lambda: falls(bytes_per_s, middle),
        "jitters": lambda: jitters(bytes_per_s, seed=number),
        "stalls for 1 s": lambda: stalls(bytes_per_s, middle),
    }
    return made[name]()


def measure(server, link: ShapedLink, new_shape: Callable[[], Shape], text: str, settle: int) -> dict:
    """One request on the shaped link, after some on a steady one."""
    messages = [{"role": "user", "content": text}]
    for _ in range(settle):
        hit(server.client, messages, ANSWER_TOKENS)
    before = server.client.metrics()
    link.begin(new_shape())
    sample = hit(server.client, messages, ANSWER_TOKENS)
    after = server.client.metrics()
    events = {
        name: sum(value - before.get(key, 0.0) for key, value in after.items() if key.startswith(f"kvcodec_{name}"))
        for name in _EVENTS
    }
    return {"reply": sample.reply, "fetched_bytes": sample.fetched_bytes} | events


def rows_of(rounds: Mapping[str, Sequence[Mapping[str, dict]]], common: dict) -> list[dict]:
    rows = []
    for shape, samples in rounds.items():
        for way in ("prefill", *WAYS):
            ttfts_s = [sample[way]["reply"].ttft_s for sample in samples]
            prefills_s = [sample["prefill"]["reply"].ttft_s for sample in samples]
            oracles_s = [min(sample[which]["reply"].ttft_s for which in ("prefill", "exact")) for sample in samples]
            row = {
                "shape": shape,
                "way": way,
                "rounds": len(samples),
                **spread("ttft_s", ttfts_s),
                "over_oracle_median": over(ttfts_s, oracles_s),
                "over_prefill_median": over(ttfts_s, prefills_s),
                "over_oracle_worst": round(max(t / o for t, o in zip(ttfts_s, oracles_s, strict=True)), 3),
                "same_words": sum(sample[way]["reply"].text == sample["prefill"]["reply"].text for sample in samples),
            }
            if way in WAYS:
                row |= {
                    "cached_storage_tokens_median": statistics.median(
                        sample[way]["reply"].cached.storage for sample in samples
                    ),
                    "fetched_bytes_median": statistics.median(sample[way]["fetched_bytes"] for sample in samples),
                    **{name: sum(sample[way][name] for sample in samples) for name in _EVENTS},
                }
            rows.append(row | common)
    return rows


def main() -> None:
    parser = parser_of(__doc__, rounds=7)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--bandwidth", default="200Mbps", help="of the link while it is steady")
    parser.add_argument("--round-trip-ms", type=float, default=0.0, help="of the link, beside what loopback takes")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--settle", type=int, default=2, help="requests on the steady link before each measured one")
    options = parse(parser)
    bytes_per_s = parse_bits_per_s(options.bandwidth) / 8
    texts = prompts(options.model, options.prompt_tokens)
    load_before = load_average()
    rounds: dict[str, list[dict]] = defaultdict(list)
    with Lab(options.model, server_args=("--chunked-prefill-size", "256")) as lab:
        peer = ShapedPeer(lab.work_dir / "store")
        peer.start("unlimited")
        try:
            upstream, round_trip_s = peer.remote.removeprefix("grpc://"), options.round_trip_ms / 1e3
            with ShapedLink(upstream, steady(bytes_per_s), round_trip_s) as link:
                plain = lab.start_server("plain", None, len(WAYS) + 1)
                servers = {
                    way: lab.start_server(way, KVCodecArgs(link.remote, profile, plan=plan), len(WAYS) + 1)
                    for way, (profile, plan) in WAYS.items()
                }
                for server in servers.values():
                    # Who has never computed a prompt has nothing to compare a fetch with.
                    ask(server, next(texts), 1)
                texts = (text for text, _ in clear_texts(plain.client, texts, ANSWER_TOKENS))
                for number in range(options.rounds + 1):
                    text = next(texts)
                    for server in servers.values():
                        server.client.forget()
                        ask(server, text, ANSWER_TOKENS)
                        if not server.client.wait_published(timeout_s=120):
                            raise RuntimeError(f"{server.name} has not published a fresh text")
                    link.begin(steady(bytes_per_s))
                    whole = hit(servers["exact"].client, [{"role": "user", "content": text}], ANSWER_TOKENS)
                    fetched_bytes = whole.fetched_bytes
                    # The first round warms up, and is not kept.
                    for shape in rotated(options.shapes, number) if number else options.shapes[:1]:
                        sample = {}
                        for way in rotated(["prefill", *WAYS], number):
                            if way == "prefill":
                                plain.client.flush_cache()
                                sample[way] = {"reply": ask(plain, text, ANSWER_TOKENS)}
                                continue
                            link.begin(steady(bytes_per_s))
                            sample[way] = measure(
                                servers[way],
                                link,
                                lambda shape=shape, size=fetched_bytes, seed=number: shape_of(
                                    shape, bytes_per_s, size, seed
                                ),
                                text,
                                options.settle,
                            )
                        ttfts = {way: round(each["reply"].ttft_s, 3) for way, each in sample.items()}
                        print(f"round {number} {shape:16} {ttfts}", flush=True)
                        if number:
                            rounds[shape].append(sample)
        finally:
            peer.stop()
    common = {
        "model": options.model.rpartition("/")[2],
        "bandwidth": options.bandwidth,
        "round_trip_ms": options.round_trip_ms,
        "answer_tokens": ANSWER_TOKENS,
        "shaping": "relay with a token bucket",
        "load_average_before": load_before,
        "load_average_after": load_average(),
    }
    rows = rows_of({shape: rounds[shape] for shape in options.shapes}, common)
    for row in rows:
        print(
            f"{row['shape']:16} {row['way']:8} TTFT {row['ttft_s_median']:.3f} s; {row['over_oracle_median']:.2f} of "
            f"the oracle (worst {row['over_oracle_worst']:.2f}), {row['over_prefill_median']:.2f} of prefill; "
            f"words {row['same_words']}/{row['rounds']}"
        )
    if not options.dry:
        print(record("bad-network", rows))


if __name__ == "__main__":
    main()
