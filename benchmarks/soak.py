"""Two real servers under load while their peer is killed and started again every few seconds.

Each server has several clients, which ask one prompt after another of a few that share their beginnings; both have so
little room on the device and in host memory that prefixes keep coming from the peer, when it is there. Every answer is
compared with that of a server without kvcodec. Every half minute memory, threads and file descriptors of the servers
are noted, after the first two minutes as a baseline; so are those of a server without kvcodec, which has as many
clients and as little room.

It fails if a request fails, if a server ends, or if words differ.

python -m benchmarks.soak [--minutes 10] [--kill-every-s 5] [--clients 3]
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import random
import statistics
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator

from benchmarks.record import record
from benchmarks.serving import ask, load_average, parse, parser_of, prompts
from sglang_kvcodec.latency.servers import Lab
from sglang_kvcodec.testing.clear_texts import clear_texts
from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.testing.processes import KVCodecArgs, ProcessError, SGLangProcess, free_port, process_tree

ANSWER_TOKENS = 8
SMALL = ("--max-total-tokens", "6000", "--chunked-prefill-size", "512")
NOTE_EVERY_S = 30.0
SETTLE_S = 120.0
STEMS, TEXTS_OF_A_STEM = 6, 4


@dataclasses.dataclass
class Usage:
    """Of one process, or of all of a server."""

    memory_bytes: int = 0
    threads: int = 0
    file_descriptors: int = 0


def usage_of_process(pid: int) -> Usage:
    """What a process takes now; nothing if it has ended."""
    try:
        status = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines())
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        return Usage(int(status["RssAnon"].split()[0]) << 10, int(status["Threads"]), descriptors)
    except (OSError, KeyError):
        return Usage()


def usage_of(server: SGLangProcess) -> Usage:
    """What all processes of a server take now."""
    usages = [dataclasses.astuple(usage_of_process(pid)) for pid in process_tree(server.pid)]
    return Usage(*map(sum, zip(*usages, strict=True)))


class Load:
    """One server's requests, of several clients at once."""

    def __init__(self, server: SGLangProcess, expected: dict[str, str], seed: int, clients: int) -> None:
        self.server, self.expected = server, expected
        self.answered = self.storage_tokens = 0
        self.failures: list[str] = []
        self.different: list[str] = []
        self.is_over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(random.Random(f"{seed} {client}"),), daemon=True)
            for client in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, source: random.Random) -> None:
        texts = list(self.expected)
        while not self.is_over.is_set():
            text = source.choice(texts)
            try:
                reply = ask(self.server, text, ANSWER_TOKENS)
            except (OSError, urllib.error.URLError, ProcessError, RuntimeError, ValueError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                continue
            with self._lock:
                self.answered += 1
                self.storage_tokens += reply.cached.storage
            if reply.text != self.expected[text]:
                self.different.append(text)

    def end(self) -> None:
        self.is_over.set()
        for thread in self._threads:
            thread.join()


def errors_of(log: str) -> list[str]:
    """The line before each traceback of a log, and the one that ends it."""
    lines, found = log.splitlines(), []
    for number, line in enumerate(lines):
        if line.startswith("Traceback"):
            end = next((text for text in lines[number + 1 :] if text and not text[0].isspace()), "")
            found.append(f"{lines[number - 1][20:] if number else ''} ... {end}")
    return found


def expected_answers(plain: SGLangProcess, source: Iterator[str]) -> dict[str, str]:
    """Text -> clear answer, of texts of which several begin alike."""
    answers: dict[str, str] = {}
    for _ in range(STEMS):
        stem = next(source)
        clear = clear_texts(plain.client, (stem + tail[:800] for tail in source), ANSWER_TOKENS)
        answers |= dict(itertools.islice(clear, TEXTS_OF_A_STEM))
    return answers


def main() -> int:
    parser = parser_of(__doc__, rounds=0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kill-every-s", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=3, help="of each server, at once")
    parser.add_argument("--profile", default="exact", help="also several, raw,exact")
    options = parse(parser)
    if options.quick:
        options.minutes = 1.0
    source = prompts(options.model, 700)
    load_before = load_average()
    kills = 0
    with Lab(options.model, server_args=SMALL) as lab:
        port = free_port()
        store = f"lmdb:{lab.work_dir / 'store'}"
        peer = PeerProcess(store, "1GB", port, arguments=("--log-level", "error"))
        try:
            plain = lab.start_server("plain", None, 3)
            expected = expected_answers(plain, source)
            print(f"{len(expected)} prompts", flush=True)
            arguments = ("--kvcodec-host-cache", "2MB", "--kvcodec-publish-queue", "16MB")
            servers = [
                lab.start_server(name, KVCodecArgs(peer.remote, options.profile, arguments, plan=plan), 3)
                for name, plan in (("always", "always"), ("auto", "auto"))
            ] + [plain]
            loads = [Load(server, expected, seed, options.clients) for seed, server in enumerate(servers)]
            notes: list[list[Usage]] = []
            started_s = time.monotonic()
            next_note_s = started_s
            chance = random.Random(1)
            while time.monotonic() - started_s < options.minutes * 60:
                time.sleep(options.kill_every_s * chance.uniform(0.5, 1.5))
                peer.kill()
                kills += 1
                time.sleep(chance.uniform(0.1, 2.0))
                peer = PeerProcess(store, "1GB", port, arguments=("--log-level", "error"))
                if time.monotonic() >= next_note_s:
                    next_note_s += NOTE_EVERY_S
                    notes.append([usage_of(server) for server in servers])
                    done = ", ".join(
                        f"{load.server.name} {load.answered} answers, {load.storage_tokens} tokens from the peer"
                        for load in loads
                    )
                    print(f"{time.monotonic() - started_s:4.0f} s, {kills} kills: {done}; {notes[-1]}", flush=True)
            for load in loads:
                load.end()
            alive = all(server.alive for server in servers)
            if alive:
                for server in servers:
                    # Fails if a request or a slot is still held.
                    server.client.flush_cache()
            ahead = [
                server.client.metric_by("kvcodec_ahead_restores_total", "outcome") if server.alive else {}
                for server in servers
            ]
            errors = [errors_of(server.log_text()) for server in servers]
        finally:
            peer.kill()
    settled = max(1, min(len(notes) - 1, int(SETTLE_S / NOTE_EVERY_S)))
    rows = []
    for index, load in enumerate(loads):
        first, last = [note[index] for note in notes[settled : settled + 3]], [note[index] for note in notes[-3:]]
        rows.append(
            {
                "server": load.server.name,
                "profile": None if load.server is plain else options.profile,
                "minutes": options.minutes,
                "clients": options.clients,
                "kills": kills,
                "answers": load.answered,
                "tokens_from_peer": load.storage_tokens,
                "restored_ahead_by_outcome": ahead[index],
                "failed_requests": len(load.failures),
                "answers_with_other_words": len(load.different),
                "servers_alive": alive,
                **{
                    f"{name}_{when}": statistics.median(getattr(usage, name) for usage in usages)
                    for name in ("memory_bytes", "threads", "file_descriptors")
                    for when, usages in (("settled", first), ("end", last))
                },
                "logged": {error: errors[index].count(error) for error in sorted(set(errors[index]))},
                "load_average_before": load_before,
                "load_average_after": load_average(),
            }
        )
        print(rows[-1])
        for failure in load.failures[:5]:
            print(f"failed: {failure}")
    if not options.dry:
        print(record("soak", rows))
    return int(not alive or any(load.failures or load.different for load in loads))


if __name__ == "__main__":
    sys.exit(main())
