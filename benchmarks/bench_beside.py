"""What a request that is being answered notices of hits that come beside it, on a real server.

A long answer is under way while requests for one token come, one after the other. What they need is the same each time,
a prompt of the same length, and where its KV comes from is what differs: they are computed (``prefill``), found in the
server's own pool (``device``), or fetched from a peer (``fetch``, at each bandwidth). ``device`` is a hit without a
fetch: what a fetch adds to it is what it costs others. ``alone`` is the same answer without anybody beside.

For each answer the time per token, and the longest pause between two of them, of the requests beside the time to their
first token. The hits come in the first part of the answer, until they are all answered.

python -m benchmarks.bench_beside [--rounds 5] [--beside 3] [--tokens 500] [--bandwidths 100Mbps unlimited]
    [--separate]
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.deeper import deepened
from benchmarks.record import record
from benchmarks.serving import Places, ask, load_average, over, parse, parser_of, prompts
from sglang_kvcodec.config import PROFILES
from sglang_kvcodec.latency.rows import spread
from sglang_kvcodec.latency.servers import Lab, ShapedPeer
from sglang_kvcodec.latency.sweep import rotated
from sglang_kvcodec.testing.processes import KVCodecArgs, SGLangProcess
from sglang_kvcodec.testing.sglang_client import ChatReply

ALONE, PREFILL, DEVICE, FETCH = "alone", "prefill", "device", "fetch"
LEAD_TOKENS = 20
"""Of the answer, before the first request beside comes."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """One answer and those beside it."""

    answer: ChatReply
    beside: Sequence[ChatReply]

    @property
    def token_s(self) -> float:
        return (self.answer.total_s - self.answer.ttft_s) / (self.answer.completion_tokens - 1)


def answered(server: SGLangProcess, text: str, tokens: int, token_s: float, beside: Sequence[str]) -> Seen:
    """An answer of so many tokens, while the texts ``beside`` are asked one after the other."""
    replies: list[ChatReply] = []

    def ask_beside() -> None:
        time.sleep(LEAD_TOKENS * token_s)
        replies.extend(ask(server, each, 1) for each in beside)

    thread = threading.Thread(target=ask_beside)
    thread.start()
    answer = ask(server, text, tokens, ignore_eos=True)
    ended_s = time.perf_counter()
    thread.join()
    if time.perf_counter() - ended_s > 0.1:
        raise RuntimeError("the answer ended before those beside it: give it more --tokens")
    return Seen(answer, replies)


def rows_of(rounds: dict[str, list[dict[str, Seen]]], bandwidth: str, common: dict) -> list[dict]:
    rows = []
    found = rounds[bandwidth]
    for way in (ALONE, DEVICE, PREFILL, FETCH):
        seen = [each[way] for each in found]
        gaps_s = [each.answer.longest_gap_s for each in seen]
        row = {
            "beside": way,
            "bandwidth": bandwidth if way == FETCH else "",
            "rounds": len(seen),
            **spread("token_s", [each.token_s for each in seen], 5),
            **spread("longest_gap_s", gaps_s),
        }
        for other in (ALONE, DEVICE):
            row[f"token_s_over_{other}_median"] = over(
                [each.token_s for each in seen], [each[other].token_s for each in found]
            )
        if way != ALONE:
            row["longest_gap_over_device_median"] = over(gaps_s, [each[DEVICE].answer.longest_gap_s for each in found])
            row |= spread("ttft_beside_s", [reply.ttft_s for each in seen for reply in each.beside])
            for tier in ("device", "storage"):
                row[f"cached_{tier}_tokens_median"] = statistics.median(
                    getattr(reply.cached, tier) for each in seen for reply in each.beside
                )
        rows.append(row | common)
    return rows


def main() -> None:
    parser = parser_of(__doc__, rounds=5)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--layers", type=int, help="repeat the model's layers until there are so many")
    parser.add_argument("--beside", type=int, default=3, help="requests beside each answer")
    parser.add_argument("--tokens", type=int, default=500, help="of the answer")
    parser.add_argument("--profile", default="exact", choices=PROFILES)
    parser.add_argument("--separate", action="store_true", help="the model has a CPU of its own, and so has kvcodec")
    parser.add_argument("--bandwidths", nargs="+", default=["100Mbps", "unlimited"], help="unlimited, or as 100Mbps")
    options = parse(parser)
    places = Places(options.separate)
    texts = prompts(options.model, options.prompt_tokens)
    short_texts = prompts(options.model, 50)
    load_before = load_average()
    rounds: dict[str, list[dict[str, Seen]]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        model = options.model
        if options.layers:
            work_dir = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvcodec-bench-")))
            model = str(deepened(pathlib.Path(model), options.layers, work_dir / "model"))
        lab = stack.enter_context(Lab(model))
        peer = stack.enter_context(ShapedPeer(lab.work_dir / "store"))
        peer.start("unlimited")
        with places.of_the_model():
            server = lab.start_server("server", KVCodecArgs(peer.remote, options.profile, places.server_args))
        token_s = 0.01
        for number in range(options.rounds + 1):
            # The first round warms up, and is not kept.
            for bandwidth in rotated(options.bandwidths, number) if number else options.bandwidths[-1:]:
                stored = [next(texts) for _ in range(options.beside)]
                peer.start("unlimited", [server.client])
                server.client.forget()
                for text in stored:
                    ask(server, text, 1)
                if not server.client.wait_published(timeout_s=120):
                    raise RuntimeError("the prefixes were not published")
                seen: dict[str, Seen] = {}
                seen[DEVICE] = answered(server, next(short_texts), options.tokens, token_s, stored)
                seen[ALONE] = answered(server, next(short_texts), options.tokens, token_s, ())
                token_s = seen[ALONE].token_s
                peer.start(bandwidth, [server.client])
                for way in rotated((FETCH, PREFILL), number):
                    if way == FETCH:
                        server.client.forget()
                    asked = stored if way == FETCH else [next(texts) for _ in stored]
                    seen[way] = answered(server, next(short_texts), options.tokens, token_s, asked)
                    if way == PREFILL and not server.client.wait_published(timeout_s=120):
                        raise RuntimeError("what was computed was not published")
                print(
                    f"round {number} {bandwidth:9}",
                    {
                        way: (
                            f"{each.token_s * 1e3:.2f} ms",
                            f"gap {each.answer.longest_gap_s:.3f} s",
                            [round(reply.ttft_s, 2) for reply in each.beside],
                        )
                        for way, each in seen.items()
                    },
                    flush=True,
                )
                if number:
                    rounds[bandwidth].append(seen)
    common = {
        "model": options.model.rpartition("/")[2],
        "layers": options.layers or "of the model",
        "profile": options.profile,
        "prompt_tokens": options.prompt_tokens,
        "requests_beside": options.beside,
        "answer_tokens": options.tokens,
        **places.row(),
        "shaping": "token bucket in the peer",
        "load_average_before": load_before,
        "load_average_after": load_average(),
    }
    rows = [row for bandwidth in options.bandwidths for row in rows_of(rounds, bandwidth, common)]
    for row in rows:
        print({name: value for name, value in row.items() if name not in common and not name.endswith(("p10", "p90"))})
    if not options.dry:
        print(record("beside", rows))


if __name__ == "__main__":
    main()
