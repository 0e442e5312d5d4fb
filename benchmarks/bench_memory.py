"""Peak memory of an SGLang server with kvcodec that stores and fetches prefixes, against one without; and of the peer.

One server after the other gets the same prompts. Each computes all of them, publishes, forgets all (device tree and
host cache), and gets all of them again. Figures are VmHWM and VmRSS of /proc, which count pages that processes share
in each of them; the scheduler is the process that holds model, KV pool and kvcodec.

python -m benchmarks.bench_memory [--rounds 20] [--prompt-tokens 2000]    a round is a prefix
"""

from __future__ import annotations

import pathlib
import re

from benchmarks.record import record
from benchmarks.serving import ask, load_average, parse, parser_of, prompts
from sglang_kvcodec.config import PROFILES
from sglang_kvcodec.latency.servers import Lab
from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.testing.processes import KVCodecArgs, SGLangProcess, process_tree

ANSWER_TOKENS = 8
SCHEDULER = "sglang::scheduler"


def memory_bytes(pid: int) -> dict[str, int]:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(VmHWM|VmRSS|RssAnon):\s+(\d+) kB$", status, re.M)}


def title(pid: int) -> str:
    """What a process calls itself."""
    return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def server_memory(server: SGLangProcess) -> dict[str, int]:
    pids = process_tree(server.pid)
    (scheduler,) = [pid for pid in pids if title(pid).startswith(SCHEDULER)]
    tree = [memory_bytes(pid) for pid in pids]
    own = memory_bytes(scheduler)
    return {
        "scheduler_peak_bytes": own["VmHWM"],
        "scheduler_rss_bytes": own["VmRSS"],
        "tree_peak_bytes": sum(values.get("VmHWM", 0) for values in tree),
        "tree_rss_bytes": sum(values.get("VmRSS", 0) for values in tree),
    }


def exercise(server: SGLangProcess, texts: list[str], with_kvcodec: bool) -> dict[str, object]:
    """Has ``texts`` computed, forgotten and answered again."""
    fresh = server_memory(server)
    for text in texts:
        ask(server, text, ANSWER_TOKENS)
    if with_kvcodec:
        if not server.client.wait_published(timeout_s=300):
            raise RuntimeError(f"{server.name} did not publish what it computed")
        server.client.forget()
    else:
        server.client.flush_cache()
    stored = server_memory(server)
    cached = [ask(server, text, ANSWER_TOKENS).cached.storage for text in texts]
    values = server.client.metrics()
    return {
        **{f"{name}_at_start": value for name, value in fresh.items() if "rss" in name},
        **{f"{name}_after_storing": value for name, value in stored.items() if "peak" in name},
        **server_memory(server),
        "prefixes": len(texts),
        "cached_storage_tokens": sum(cached),
        "published_bytes": values.get("kvcodec_published_bytes_total"),
        "host_cache_bytes": values.get("kvcodec_host_cache_bytes"),
    }


def main() -> None:
    parser = parser_of(__doc__, rounds=20)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), choices=PROFILES)
    options = parse(parser)
    source = prompts(options.model, options.prompt_tokens)
    texts = [next(source) for _ in range(options.rounds)]
    load_before = load_average()
    rows = []
    for name in ("plain", *options.profiles):
        with Lab(options.model) as lab:
            store = f"lmdb:{lab.work_dir / 'store'}"
            with PeerProcess(store, "4GB", arguments=("--log-level", "warning")) as peer:
                row: dict[str, object] = {"what": name}
                if name == "plain":
                    row |= exercise(lab.start_server(name, None), texts, with_kvcodec=False)
                else:
                    row["peer_peak_bytes_at_start"] = memory_bytes(peer.pid)["VmHWM"]
                    row |= exercise(lab.start_server(name, KVCodecArgs(peer.remote, name)), texts, with_kvcodec=True)
                    memory = memory_bytes(peer.pid)
                    row |= {"peer_peak_bytes": memory["VmHWM"], "peer_anonymous_bytes": memory["RssAnon"]}
        rows.append(row)
    for row in rows:
        row |= {f"{name}_over_plain": row[name] - rows[0][name] for name in ("scheduler_peak_bytes", "tree_peak_bytes")}
        row["scheduler_peak_ratio"] = round(row["scheduler_peak_bytes"] / rows[0]["scheduler_peak_bytes"], 3)
        row |= {
            "model": options.model.rpartition("/")[2],
            "prompt_tokens": options.prompt_tokens,
            "load_average_before": load_before,
            "load_average_after": load_average(),
        }
        scheduler, tree, over_scheduler, over_tree, host, peer = (
            (row.get(name) or 0) / 1e6
            for name in (
                *("scheduler_peak_bytes", "tree_peak_bytes", "scheduler_peak_bytes_over_plain"),
                *("tree_peak_bytes_over_plain", "host_cache_bytes", "peer_peak_bytes"),
            )
        )
        print(
            f"{row['what']:6} scheduler peak {scheduler:.0f} MB ({over_scheduler:+.0f}), tree {tree:.0f} MB "
            f"({over_tree:+.0f}); host cache {host:.0f} MB; peer {peer:.0f} MB; "
            f"{row['cached_storage_tokens']} tokens from storage"
        )
    if not options.dry:
        print(record("memory", rows))


if __name__ == "__main__":
    main()
