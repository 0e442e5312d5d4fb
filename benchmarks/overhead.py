"""Servers that should serve alike, asked the same fresh prompts in turn: TTFT of one, throughput of several at once."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

from benchmarks.serving import ask, ask_all, cpu_s
from sglang_kvcodec.latency.rows import spread
from sglang_kvcodec.latency.sweep import rotated
from sglang_kvcodec.testing.processes import SGLangProcess

TTFT_ANSWER_TOKENS = 8
SINGLES = 3
"""Requests alone in every round."""


def measure(
    servers: Mapping[str, SGLangProcess],
    texts: Iterator[str],
    rounds: int,
    batch: int,
    at_once: int,
    answer_tokens: int,
    settle: bool,
) -> dict:
    """``name -> figure -> values``, after one round that does not count.

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
        singles, several = [next(texts) for _ in range(SINGLES)], [next(texts) for _ in range(batch)]
        found: dict = {name: defaultdict(list) for name in servers}
        for index, text in enumerate(singles):
            for name in rotated(list(servers), number + index):
                found[name]["ttft_s"].append(ask(servers[name], text, TTFT_ANSWER_TOKENS).ttft_s)
                found[name]["publish_s"].append(publish_s(servers[name], settle))
        for name in rotated(list(servers), number):
            before_s = cpu_s(servers[name])
            found[name]["tokens_per_s"].append(ask_all(servers[name], several, answer_tokens, at_once))
            publish_s(servers[name], settle)
            found[name]["batch_cpu_s"].append(cpu_s(servers[name]) - before_s)
        for name, figures in found.items():
            for figure, values in figures.items():
                # The first round warms up.
                samples[name][figure] += values if number else []
        shown = {name: (round(f["ttft_s"][-1], 3), round(f["tokens_per_s"][-1], 1)) for name, f in found.items()}
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

    A ratio above one means slower, for throughput too. CPU time is that of all processes of the server over the batch,
    with publishing if that is waited for.
    """
    rows = []
    base = samples[baseline]
    for name, found in samples.items():
        ttft = [a / b for a, b in zip(found["ttft_s"], base["ttft_s"], strict=True)]
        cpu = [a / b for a, b in zip(found["batch_cpu_s"], base["batch_cpu_s"], strict=True)]
        time_per_token = [b / a for a, b in zip(found["tokens_per_s"], base["tokens_per_s"], strict=True)]
        rows.append(
            {
                "what": name,
                "rounds": len(found["tokens_per_s"]),
                "singles": len(found["ttft_s"]),
                **spread("ttft_s", found["ttft_s"]),
                **spread("ttft_ratio", ttft, 3),
                **spread("tokens_per_s", found["tokens_per_s"], 2),
                **spread("slowdown", time_per_token, 3),
                **spread("batch_cpu_s", found["batch_cpu_s"], 2),
                **spread("batch_cpu_ratio", cpu, 3),
                **spread("publish_s", found["publish_s"], 2),
                **common,
            }
        )
        row = rows[-1]
        print(
            f"{name:12} TTFT {row['ttft_s_median']:.3f} s, ratio {row['ttft_ratio_median']:.3f} "
            f"({row['ttft_ratio_p10']:.3f} to {row['ttft_ratio_p90']:.3f}); {row['tokens_per_s_median']:.1f} tokens/s, "
            f"slowdown {row['slowdown_median']:.3f} ({row['slowdown_p10']:.3f} to {row['slowdown_p90']:.3f}); "
            f"CPU {row['batch_cpu_ratio_median']:.3f} ({row['batch_cpu_ratio_p10']:.3f} to "
            f"{row['batch_cpu_ratio_p90']:.3f}); published after {row['publish_s_median']:.2f} s"
        )
    return rows
