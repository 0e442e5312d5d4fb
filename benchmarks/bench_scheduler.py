"""What kvcodec takes of the scheduler's thread per scheduling pass while many requests wait for their pages.

One real server. Its peer has the prefix of every request and is shaped so far down that all of them wait, each with a
fetch under way or queued (``--kvcodec-plan always``). Beside them requests are answered, one after the other, so that
passes go on. The histogram ``kvcodec_scheduler_seconds`` of the server gives the times in that window;
``between_tokens_s`` is the time per token of the requests beside, without and with those who wait, from the same run.

python -m benchmarks.bench_scheduler [--waiting 100] [--tokens 300]
"""

from __future__ import annotations

import re
import statistics
import threading
import time
import urllib.request

from benchmarks.record import record
from benchmarks.serving import ask, load_average, parse, parser_of, prompts
from sglang_kvcodec.latency.servers import Lab, ShapedPeer
from sglang_kvcodec.testing.processes import KVCodecArgs, SGLangProcess

PROMPT_TOKENS = 150
SLOW = "2Mbps"
ARRIVE_S = 1.0
"""Until all requests have reached the scheduler."""
TARGET_S = 1e-3


def histogram(server: SGLangProcess, name: str) -> dict[float, float]:
    """Upper bound in seconds -> passes up to it."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        text = response.read().decode()
    found: dict[float, float] = {}
    for bound, count in re.findall(rf'^{name}_bucket{{.*?le="(\S+?)".*?}} (\S+)$', text, re.MULTILINE):
        found[float(bound)] = found.get(float(bound), 0.0) + float(count)
    return found


def grown(before: dict[float, float], after: dict[float, float]) -> dict[float, float]:
    return {bound: count - before.get(bound, 0.0) for bound, count in after.items()}


def quantile(counts: dict[float, float], share: float) -> float:
    """Upper bound of the bucket that has it."""
    total = max(counts.values())
    return min(bound for bound, count in counts.items() if count >= share * total)


def token_s(server: SGLangProcess, text: str, tokens: int) -> float:
    """Seconds per token of an answer of so many."""
    reply = ask(server, text, tokens, ignore_eos=True)
    return (reply.total_s - reply.ttft_s) / (reply.completion_tokens - 1)


def main() -> None:
    parser = parser_of(__doc__, rounds=4)
    parser.add_argument("--waiting", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=300, help="of the answer beside them")
    options = parse(parser)
    if options.quick:
        options.waiting, options.tokens = 8, 50
    texts = prompts(options.model, PROMPT_TOKENS)
    load_before = load_average()
    with Lab(options.model) as lab:
        peer = ShapedPeer(lab.work_dir / "store")
        try:
            peer.start("unlimited")
            server = lab.start_server("server", KVCodecArgs(peer.remote))
            beside, *waiting = (next(texts) for _ in range(options.waiting + 1))
            for number, text in enumerate(waiting, 1):
                ask(server, text, 1)
                if number % 10 == 0:
                    print(f"{number} prefixes computed", flush=True)
            if not server.client.wait_published(timeout_s=120):
                raise RuntimeError("the prefixes were not published")
            server.client.forget()
            # The first answer after a load is a slow one.
            token_s(server, beside, options.tokens)
            alone_s = [token_s(server, next(texts), options.tokens) for _ in range(options.rounds)]
            peer.start(SLOW, [server.client])
            server.client.forget()
            threads = [threading.Thread(target=ask, args=(server, text, 1), daemon=True) for text in waiting]
            for thread in threads:
                thread.start()
            time.sleep(ARRIVE_S)
            before, started_s = histogram(server, "kvcodec_scheduler_seconds"), time.perf_counter()
            # Their own prefixes are not stored, so that they wait for none.
            together_s = [token_s(server, next(texts), options.tokens) for _ in range(options.rounds)]
            window_s = time.perf_counter() - started_s
            still_waiting = sum(thread.is_alive() for thread in threads)
            counts = grown(before, histogram(server, "kvcodec_scheduler_seconds"))
        finally:
            peer.stop()
    passes = max(counts.values())
    row = {
        "waiting": options.waiting,
        "waiting_at_the_end": still_waiting,
        "passes": passes,
        "window_s": round(window_s, 1),
        "pass_s_p50_at_most": quantile(counts, 0.5),
        "pass_s_p90_at_most": quantile(counts, 0.9),
        "pass_s_p99_at_most": quantile(counts, 0.99),
        "share_under_1ms": round(max(n for bound, n in counts.items() if bound <= TARGET_S) / passes, 4),
        "buckets": {str(bound): count for bound, count in sorted(counts.items())},
        "between_tokens_s_alone": [round(each, 5) for each in alone_s],
        "between_tokens_s_beside_waiting": [round(each, 5) for each in together_s],
        "ratio_of_token_times": round(statistics.median(together_s) / statistics.median(alone_s), 3),
        "model": options.model.rpartition("/")[2],
        "load_average_before": load_before,
        "load_average_after": load_average(),
    }
    print(row)
    if not options.dry:
        print(record("scheduler", [row]))


if __name__ == "__main__":
    main()
