"""TTFT and throughput of servers with kvcodec whose peer is down, against servers without, in one run.

``refused``: nothing listens at the peer's address. ``black_hole``: a socket there accepts and never answers.
``plain_again`` is a second server without kvcodec: its ratio to the first is what this machine's noise amounts to.

python -m benchmarks.bench_peer_down [--rounds 12] [--prompt-tokens 700]
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from benchmarks.overhead import TTFT_ANSWER_TOKENS, measure, rows_of
from benchmarks.record import record
from benchmarks.serving import load_average, parse, parser_of, prompts
from sglang_kvcodec.latency.servers import Lab
from sglang_kvcodec.testing.processes import KVCodecArgs, free_port


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """The URL of a peer that takes connections and says nothing."""
    taken = []

    def accept() -> None:
        # Ends when the listening socket is shut down.
        with contextlib.suppress(OSError):
            while True:
                taken.append(server.accept()[0])

    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"grpc://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in taken:
                connection.close()


def main() -> None:
    parser = parser_of(__doc__, rounds=12)
    parser.add_argument("--prompt-tokens", type=int, default=700)
    parser.add_argument("--batch", type=int, default=4, help="requests at once for the throughput figure")
    parser.add_argument("--answer-tokens", type=int, default=32, help="of each of these")
    parser.add_argument("--profile", default="exact")
    options = parse(parser)
    load_before = load_average()
    with Lab(options.model) as lab, black_hole() as silent:
        kinds = {
            "plain": None,
            "refused": KVCodecArgs(f"grpc://127.0.0.1:{free_port()}", options.profile),
            "plain_again": None,
            "black_hole": KVCodecArgs(silent, options.profile),
        }
        servers = {name: lab.start_server(name, kvcodec, len(kinds)) for name, kvcodec in kinds.items()}
        texts = prompts(options.model, options.prompt_tokens)
        samples = measure(
            servers, texts, options.rounds, options.batch, options.batch, options.answer_tokens, settle=False
        )
        drops = {name: server.client.metrics().get("kvcodec_publish_drops_total") for name, server in servers.items()}
    common = {
        "model": options.model.rpartition("/")[2],
        "profile": options.profile,
        "prompt_tokens": options.prompt_tokens,
        "ttft_answer_tokens": TTFT_ANSWER_TOKENS,
        "batch": options.batch,
        "batch_answer_tokens": options.answer_tokens,
        "load_average_before": load_before,
        "load_average_after": load_average(),
    }
    rows = rows_of(samples, "plain", common)
    for row in rows:
        row["pages_dropped"] = drops[row["what"]]
    if not options.dry:
        print(record("peer-down", rows))


if __name__ == "__main__":
    main()
