"""The planner against an oracle that may also fetch a part of a prefix and compute the rest, on real servers.

For each share of a text one has been stored so far, and no further, in each of the tiers: a server of one tier that
takes every hit fetches that much and computes the rest. Share 0 is a prefill on a server without kvcodec, share 1
fetches all. The planner has all of its text stored in all tiers. Servers that are measured publish nothing. The oracle
takes the tier and the share that were fastest in the median at that bandwidth, which it could not know beforehand.

Each round has a text of its own for each share, of the same length, which all tiers are asked for. Before the planner
is measured it has been asked ``--settle`` times at that bandwidth. Prompts are computed in passes of 256 tokens.

python -m benchmarks.bench_splits [--rounds 3] [--prompt-tokens 2000] [--tiers raw exact]
    [--bandwidths 10Mbps 30Mbps 60Mbps 120Mbps 300Mbps unlimited]
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

from benchmarks.record import record
from benchmarks.serving import ask, load_average, parse, parser_of, prompts
from sglang_kvcodec.latency.rows import spread
from sglang_kvcodec.latency.samples import hit
from sglang_kvcodec.latency.servers import Lab, ShapedPeer
from sglang_kvcodec.testing.processes import KVCodecArgs

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
PLANNER = "planner"
PREFILL = "prefill"
ANSWER_TOKENS = 4
SHOWN = ("bandwidth", "tier", "fetched", "ttft_s_median", "over_oracle", "over_prefill", "oracle_takes")
READ_ONLY = ("--kvcodec-read-only", "true")


Way = tuple[str, float]
"""A tier and a share of the prefix, or what else there is and how much of the prefix it may fetch."""


def rows_of(ttfts_s: Mapping[str, Mapping[Way, Sequence[float]]], common: dict) -> list[dict]:
    """One for each bandwidth, tier and share, and for the planner."""
    rows = []
    for bandwidth, by_way in ttfts_s.items():
        medians = {way: statistics.median(found) for way, found in by_way.items()}
        best = min((way for way in medians if way[0] != PLANNER), key=lambda way: medians[way])
        for way, found in by_way.items():
            rows.append(
                {
                    "bandwidth": bandwidth,
                    "tier": way[0],
                    "fetched": way[1],
                    **spread("ttft_s", found),
                    "over_oracle": round(medians[way] / medians[best], 3),
                    "over_prefill": round(medians[way] / medians[PREFILL, 0.0], 3),
                    "oracle_takes": f"{best[1]:g} {best[0]}",
                }
                | common
            )
    return rows


def main() -> None:
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument(
        "--bandwidths", nargs="+", default=["10Mbps", "30Mbps", "60Mbps", "120Mbps", "300Mbps", "unlimited"]
    )
    parser.add_argument("--tiers", nargs="+", default=["exact"], help="that are stored side by side, the best first")
    parser.add_argument("--settle", type=int, default=3)
    options = parse(parser)
    texts = prompts(options.model, options.prompt_tokens)
    load_before = load_average()
    ttfts_s: dict[str, dict[Way, list[float]]] = defaultdict(lambda: defaultdict(list))
    with Lab(options.model, server_args=("--chunked-prefill-size", "256")) as lab:
        peer = ShapedPeer(lab.work_dir / "store")
        try:
            peer.start("unlimited")
            every, servers = ",".join(options.tiers), len(options.tiers) + 3
            plain = lab.start_server("plain", None, servers)
            writer = lab.start_server("writer", KVCodecArgs(peer.remote, every), servers)
            readers = {
                tier: lab.start_server(tier, KVCodecArgs(peer.remote, tier, READ_ONLY), servers)
                for tier in options.tiers
            }
            planner = lab.start_server(PLANNER, KVCodecArgs(peer.remote, every, READ_ONLY, plan="auto"), servers)
            clients = [server.client for server in (writer, *readers.values(), planner)]
            for number in range(options.rounds + 1):
                stored = {share: next(texts) for share in SHARES}
                peer.start("unlimited", clients)
                for share, text in stored.items():
                    if share:
                        writer.client.forget()
                        ask(writer, text[: int(share * len(text))], 1)
                        if not writer.client.wait_published(timeout_s=120):
                            raise RuntimeError("a prefix was not published")
                # The first round warms up, and is not kept.
                for bandwidth in options.bandwidths if number else options.bandwidths[-1:]:
                    peer.start(bandwidth, clients)
                    found: dict[Way, float] = {}
                    plain.client.flush_cache()
                    found[PREFILL, 0.0] = ask(plain, stored[0.0], ANSWER_TOKENS).ttft_s
                    for share, text in stored.items():
                        messages = [{"role": "user", "content": text}]
                        for tier, reader in readers.items() if share else ():
                            found[tier, share] = hit(reader.client, messages, ANSWER_TOKENS).reply.ttft_s
                    for _ in range(options.settle + 1):
                        found[PLANNER, 1.0] = hit(planner.client, messages, ANSWER_TOKENS).reply.ttft_s
                    shown = {f"{way[1]:g} {way[0]}": round(ttft_s, 3) for way, ttft_s in found.items()}
                    print(f"round {number} {bandwidth:10} {shown}", flush=True)
                    if number:
                        for way, ttft_s in found.items():
                            ttfts_s[bandwidth][way].append(ttft_s)
        finally:
            peer.stop()
    rows = rows_of(
        ttfts_s,
        {
            "model": options.model.rpartition("/")[2],
            "tiers": every,
            "prompt_tokens": options.prompt_tokens,
            "rounds": options.rounds,
            "shaping": "the peer's token bucket",
            "load_average_before": load_before,
            "load_average_after": load_average(),
        },
    )
    for row in rows:
        print({name: value for name, value in row.items() if name in SHOWN})
    if not options.dry:
        print(record("splits", rows))


if __name__ == "__main__":
    main()
