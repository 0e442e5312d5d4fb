"""Servers that should serve alike, asked the same fresh prompts in turn: TTFT of one, throughput of several at once."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

from benchmarks.serving import ask, ask_all, rotated, spread
from sglang_kvcodec.testing.processes import SGLangProcess

TTFT_ANSWER_TOKENS = 8


def measure(
    servers: Mapping[str, SGLangProcess],
    texts: Iterator[str],
    rounds: int,
    batch: int,
    at_once: int,
    answer_tokens: int,
    settle: bool,
) -> dict:
    """``name -> figure -> one value per round``, after one round that does not count.

    Args:
        servers: all get the same prompts; who is first changes from round to round.
        texts: none twice.
        rounds: that count.
        batch: prompts of the throughput figure.
        at_once: of them.
        answer_tokens: of each of them.
        settle: whether to wait, outside of all figures, until a server has published what it computed.
    """
    samples: dict = {name: defaultdict(list) for name in servers}
    for number in range(rounds + 1):
        single, several = next(texts), [next(texts) for _ in range(batch)]
        order = rotated(list(servers), number)
        found: dict = {name: {} for name in servers}
        for name in order:
            found[name]["ttft_s"] = ask(servers[name], single, TTFT_ANSWER_TOKENS).ttft_s
            found[name]["publish_s"] = publish_s(servers[name], settle)
        for name in order:
            found[name]["tokens_per_s"] = ask_all(servers[name], several, answer_tokens, at_once)
            publish_s(servers[name], settle)
        if number:
            for name, figures in found.items():
                for figure, value in figures.items():
                    samples[name][figure].append(value)
        shown = {name: (round(f["ttft_s"], 3), round(f["tokens_per_s"], 1)) for name, f in found.items()}
        print(f"round {number} TTFT s, tokens/s: {shown}", flush=True)
    return samples


def publish_s(server: SGLangProcess, settle: bool) -> float:
    """Waits until all that the server has computed is published; how long that took."""
    started, quiet_s = time.monotonic(), 0.5
    if not settle:
        return 0.0
    if not server.client.wait_published(timeout_s=300, settle_s=quiet_s):
        raise RuntimeError(f"{server.name} did not publish what it computed")
    return max(0.0, time.monotonic() - started - quiet_s)


def rows_of(samples: Mapping, baseline: str, common: Mapping[str, object]) -> list[dict]:
    """A row per server. Ratios are medians over rounds of the figure over the baseline's in the same round.

    A ratio above one means slower, for throughput too.
    """
    rows = []
    base = samples[baseline]
    for name, found in samples.items():
        ttft = [a / b for a, b in zip(found["ttft_s"], base["ttft_s"], strict=True)]
        time_per_token = [b / a for a, b in zip(found["tokens_per_s"], base["tokens_per_s"], strict=True)]
        rows.append(
            {
                "what": name,
                "rounds": len(found["ttft_s"]),
                **spread("ttft_s", found["ttft_s"]),
                **spread("ttft_ratio", ttft, 3),
                **spread("tokens_per_s", found["tokens_per_s"], 2),
                **spread("slowdown", time_per_token, 3),
                **spread("publish_s", found["publish_s"], 2),
                **common,
            }
        )
        row = rows[-1]
        print(
            f"{name:12} TTFT {row['ttft_s_median']:.3f} s, ratio {row['ttft_ratio_median']:.3f} "
            f"({row['ttft_ratio_p10']:.3f} to {row['ttft_ratio_p90']:.3f}); {row['tokens_per_s_median']:.1f} tokens/s, "
            f"slowdown {row['slowdown_median']:.3f} ({row['slowdown_p10']:.3f} to {row['slowdown_p90']:.3f}); "
            f"published after {row['publish_s_median']:.2f} s"
        )
    return rows
