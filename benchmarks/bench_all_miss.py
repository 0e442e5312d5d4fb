"""What kvcodec costs a server whose prompts nobody has computed before: it publishes all and fetches nothing.

The peer is up and has none of the pages. Each server's TTFT is that of a request alone; the throughput is that of
``--batch`` prompts, ``--at-once`` at a time, during which the pages of the first are already encoded. Without a GPU
the encoder has the cores that the model computes on.

python -m benchmarks.bench_all_miss [--rounds 10] [--prompt-tokens 700]
"""

from __future__ import annotations

from benchmarks.overhead import TTFT_ANSWER_TOKENS, measure, rows_of
from benchmarks.record import record
from benchmarks.serving import load_average, parse, parser_of, prompts
from sglang_kvcodec.config import PROFILES
from sglang_kvcodec.latency.servers import Lab
from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.testing.processes import KVCodecArgs, SGLangProcess


def published(server: SGLangProcess) -> dict[str, object]:
    """What the server has published so far, and what it took."""
    values = server.client.metrics()
    pages = values.get("kvcodec_encode_seconds_count", 0.0)
    return {
        "pages_encoded": pages,
        "encode_ms_per_page": round(1e3 * values["kvcodec_encode_seconds_sum"] / pages, 2) if pages else None,
        "published_bytes": values.get("kvcodec_published_bytes_total"),
        "published_kv_bytes": values.get("kvcodec_published_kv_bytes_total"),
        "pages_dropped": values.get("kvcodec_publish_drops_total"),
        "fetched_bytes": values.get("kvcodec_fetched_bytes_total"),
    }


def main() -> None:
    parser = parser_of(__doc__, rounds=10)
    parser.add_argument("--prompt-tokens", type=int, default=700)
    parser.add_argument("--batch", type=int, default=8, help="requests of the throughput figure")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--answer-tokens", type=int, default=32, help="of each of these")
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), choices=PROFILES)
    options = parse(parser)
    load_before = load_average()
    with Lab(options.model) as lab:
        store = f"lmdb:{lab.work_dir / 'store'}"
        with PeerProcess(store, "8GB", arguments=("--log-level", "warning")) as peer:
            among = len(options.profiles) + 1
            servers = {"plain": lab.start_server("plain", None, among)}
            for profile in options.profiles:
                servers[profile] = lab.start_server(profile, KVCodecArgs(peer.remote, profile), among)
            texts = prompts(options.model, options.prompt_tokens)
            samples = measure(
                servers, texts, options.rounds, options.batch, options.at_once, options.answer_tokens, settle=True
            )
            figures = {name: published(server) for name, server in servers.items()}
    common = {
        "model": options.model.rpartition("/")[2],
        "prompt_tokens": options.prompt_tokens,
        "ttft_answer_tokens": TTFT_ANSWER_TOKENS,
        "batch": options.batch,
        "at_once": options.at_once,
        "batch_answer_tokens": options.answer_tokens,
        "load_average_before": load_before,
        "load_average_after": load_average(),
    }
    rows = [row | figures[row["what"]] for row in rows_of(samples, "plain", common)]
    for row in rows[1:]:
        print(f"{row['what']:6} encodes a page in {row['encode_ms_per_page']} ms")
    if not options.dry:
        print(record("all-miss", rows))


if __name__ == "__main__":
    main()
