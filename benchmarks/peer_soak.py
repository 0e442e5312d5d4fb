"""A peer under mixed load for half an hour while it is killed, stopped, paused, damaged and spoken to in garbage.

Writers put conversations page by page and delete now and then, readers look prefixes up and fetch them; the store is so
small that it evicts all the time. Every fault is one that operators meet: SIGKILL, SIGTERM, a pause of some seconds,
SIGHUP, stored bytes that have changed on disk, clients that send garbage, go away in the middle of a call, or connect
and say nothing.

It fails if a client gets a page that is not what was put, if the peer does not come back, or if an error is none of the
transport's own. Memory, threads and file descriptors of the peer are noted each half minute, also across restarts, and
compared between the first third and the last. With ``--one-process`` it is never restarted, so that a slow leak shows.

python -m benchmarks.peer_soak [--minutes 30] [--fault-every-s 10] [--one-process]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import os
import pathlib
import random
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

from benchmarks.record import record
from benchmarks.serving import load_average
from benchmarks.soak import Usage, usage_of_process
from sglang_kvcodec.config import Timeouts
from sglang_kvcodec.errors import FormatError, PeerError
from sglang_kvcodec.format.exchange import FetchedHeader, FetchedMissing, PutOutcome
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject, SideData, build_page_object
from sglang_kvcodec.format.spec import KVDtype, KVSpec, layer_groups
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.storage import open_engine
from sglang_kvcodec.testing.peer import PeerProcess

SPEC = KVSpec(layers=6, kv_heads=2, head_dim=64, page_tokens=16, dtype=KVDtype.BFLOAT16)
NAMESPACE = hashlib.sha256(b"soak").digest()
TIMEOUTS = Timeouts(connect_s=2, lookup_s=5, progress_s=5, fetch_s=20, put_s=20)
CAPACITY_BYTES = 64 << 20
CONVERSATIONS, PAGES = 60, 24
READERS, WRITERS = 4, 2
NOTE_EVERY_S = 30.0
DAMAGED_OBJECTS = 20


def page_hash(conversation: int, page: int) -> bytes:
    return hashlib.sha256(f"{conversation} {page}".encode()).digest()


def page_object(name: bytes) -> bytes:
    """The object of that name, always the same one."""
    source = random.Random(name)
    groups = [
        {side: SideData(stored=source.randbytes(source.randrange(1, 60_000))) for side in SPEC.sides}
        for _ in layer_groups(SPEC)
    ]
    return build_page_object(PageKey(NAMESPACE, name), SPEC, "raw", groups)


def is_sound(data: bytes | bytearray, name: bytes) -> bool:
    """Whether a client would take it for the page of that name."""
    try:
        PageObject(bytes(data), expected=PageKey(NAMESPACE, name))
    except FormatError:
        return False
    return True


class Counts:
    """What clients have seen, of all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.seen: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    def add(self, what: str, number: int = 1) -> None:
        with self._lock:
            self.seen[what] += number

    def is_wrong(self, what: str) -> None:
        with self._lock:
            self.wrong.append(what)


class Client:
    """One client's calls, on a thread of its own, until it is told to end."""

    def __init__(self, remote: str, kind: str, seed: int, counts: Counts, damaged: Damaged) -> None:
        self._kind, self._counts, self._damaged = kind, counts, damaged
        self._random = random.Random(seed)
        self._peer = GrpcPeer(remote, TIMEOUTS)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{kind}-{seed}", daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._peer.close()

    def _run(self) -> None:
        work = {"reader": self._read, "writer": self._write}[self._kind]
        while not self._is_over.is_set():
            try:
                work()
            except PeerError as error:
                self._counts.add(f"error {error.reason}")
                self._is_over.wait(0.2)
            except Exception as error:
                self._counts.is_wrong(f"{self._kind}: {type(error).__name__}: {error}")

    def _names(self) -> list[bytes]:
        conversation = min(int(self._random.expovariate(6 / CONVERSATIONS)), CONVERSATIONS - 1)
        return [page_hash(conversation, page) for page in range(self._random.randrange(1, PAGES + 1))]

    def _read(self) -> None:
        names = self._names()
        found = self._peer.lookup(NAMESPACE, names)
        self._counts.add("lookups")
        if not found.covered_pages:
            return
        wanted, pages = names[: found.covered_pages], {}
        cut_after = self._random.randrange(1, 20) if self._random.random() < 0.1 else None
        for number, event in enumerate(self._peer.fetch(NAMESPACE, wanted)):
            if isinstance(event, FetchedHeader):
                pages[event.page_index] = bytearray(event.header + bytes(event.object_bytes - len(event.header)))
            elif isinstance(event, FetchedMissing):
                # Evicted or deleted meanwhile, which may be after its header.
                pages.pop(event.page_index, None)
                self._counts.add("pages gone")
            else:
                pages[event.page_index][event.offset : event.offset + len(event.data)] = event.data
            if number == cut_after:
                self._counts.add("fetches left in the middle")
                return
        for index, data in pages.items():
            if bytes(data) == page_object(wanted[index]):
                self._counts.add("pages fetched")
            elif self._damaged.is_known(wanted[index]) and not is_sound(data, wanted[index]):
                # The peer does not read payloads before it sends them: the client's checksums find it.
                self._counts.add("damaged pages fetched")
                self._peer.delete(NAMESPACE, [wanted[index]])
            else:
                self._counts.is_wrong(f"page {wanted[index].hex()[:12]} is not what was put")

    def _write(self) -> None:
        names = self._names()
        present = self._peer.lookup(NAMESPACE, names).present
        missing = [name for name, is_there in zip(names, present, strict=True) if not is_there][:8]
        for result in self._peer.put(NAMESPACE, [(name, page_object(name)) for name in missing]) if missing else ():
            self._counts.add(f"put {result.outcome.value}")
            if result.outcome not in (PutOutcome.STORED, PutOutcome.ALREADY_STORED):
                self._counts.is_wrong(f"put: {result}")
        if self._random.random() < 0.05:
            self._counts.add("deleted", self._peer.delete(NAMESPACE, names[-2:]))
        self._is_over.wait(0.02)


class Damaged:
    """Objects whose stored bytes have been changed behind the peer's back."""

    def __init__(self) -> None:
        self._names: set[bytes] = set()

    def is_known(self, name: bytes) -> bool:
        return name in self._names

    def damage(self, store: str, source: random.Random) -> None:
        """Changes a byte of some objects. The peer is down."""
        with contextlib.closing(open_engine(store, CAPACITY_BYTES)) as engine:
            names = [page_hash(conversation, page) for conversation in range(CONVERSATIONS) for page in range(PAGES)]
            stored = [name for name in names if engine.get(NAMESPACE + name) is not None]
            for name in source.sample(stored, min(DAMAGED_OBJECTS, len(stored))):
                data = bytearray(engine.get(NAMESPACE + name) or b"")
                data[source.randrange(len(data))] ^= 1 << source.randrange(8)
                engine.delete(NAMESPACE + name)
                engine.put(NAMESPACE + name, bytes(data))
                self._names.add(name)


def send_garbage(address: str, source: random.Random) -> None:
    host, _, port = address.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=2) as connection:
        connection.sendall(source.randbytes(source.randrange(1, 100_000)))


LASTING_FAULTS = ("pause", "hang up", "garbage", "silent clients")
"""Those that the process survives."""
FAULTS = ("kill", "stop", "damage", *LASTING_FAULTS)


def fault(
    peer: PeerProcess,
    store: str,
    silent: list[socket.socket],
    damaged: Damaged,
    source: random.Random,
    kinds: Sequence[str] = FAULTS,
) -> str:
    """Does something to the peer, which runs afterwards."""
    kind = source.choice(kinds)
    if kind == "kill":
        peer.kill()
        time.sleep(source.uniform(0, 2))
        peer.restart()
    elif kind in ("stop", "damage"):
        peer.terminate()
        if kind == "damage":
            damaged.damage(store, source)
        peer.restart()
    elif kind == "pause":
        os.kill(peer.pid, signal.SIGSTOP)
        time.sleep(source.uniform(0.5, 8))
        os.kill(peer.pid, signal.SIGCONT)
    elif kind == "hang up":
        peer.hang_up()
    elif kind == "garbage":
        for _ in range(20):
            send_garbage(peer.address, source)
    else:
        host, _, port = peer.address.rpartition(":")
        while silent:
            silent.pop().close()
        silent += [socket.create_connection((host, int(port)), timeout=5) for _ in range(20)]
    return kind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--fault-every-s", type=float, default=10.0)
    parser.add_argument("--one-process", action="store_true", help="only faults that the process survives")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print, but keep no result")
    options = parser.parse_args()
    source, counts, faults = random.Random(options.seed), Counts(), collections.Counter[str]()
    damaged, kinds = Damaged(), LASTING_FAULTS if options.one_process else FAULTS
    load_before, notes, silent = load_average(), list[Usage](), list[socket.socket]()
    with tempfile.TemporaryDirectory() as directory:
        store = f"lmdb:{pathlib.Path(directory) / 'store'}"
        with PeerProcess(store, str(CAPACITY_BYTES), arguments=("--log-level", "error")) as peer:
            clients = [Client(peer.remote, "reader", seed, counts, damaged) for seed in range(READERS)]
            clients += [Client(peer.remote, "writer", 100 + seed, counts, damaged) for seed in range(WRITERS)]
            started_s = next_note_s = time.monotonic()
            while time.monotonic() - started_s < options.minutes * 60:
                time.sleep(options.fault_every_s * source.uniform(0.5, 1.5))
                if time.monotonic() >= next_note_s:
                    next_note_s += NOTE_EVERY_S
                    notes.append(usage_of_process(peer.pid))
                    print(f"{time.monotonic() - started_s:5.0f} s: {dict(counts.seen)} {notes[-1]}", flush=True)
                faults[fault(peer, store, silent, damaged, source, kinds)] += 1
                if counts.wrong or not peer.alive:
                    break
            is_alive = peer.alive
            for client in clients:
                client.end()
    third = max(1, len(notes) // 3)
    row: dict[str, object] = {
        "one_process": options.one_process,
        "minutes": round((time.monotonic() - started_s) / 60, 1),
        "faults": dict(faults),
        "seen": dict(counts.seen),
        "wrong": len(counts.wrong),
        "peer_alive": is_alive,
    }
    for name in ("memory_bytes", "threads", "file_descriptors"):
        first, last = (
            statistics.median(getattr(usage, name) for usage in part) for part in (notes[:third], notes[-third:])
        )
        row |= {f"{name}_first_third": first, f"{name}_last_third": last, f"{name}_ratio": round(last / first, 3)}
    row |= {"load_average_before": load_before, "load_average_after": load_average()}
    print(row)
    for wrong in counts.wrong[:10]:
        print(f"wrong: {wrong}")
    if not options.dry:
        print(record("peer_soak", [row]))
    return int(bool(counts.wrong) or not is_alive)


if __name__ == "__main__":
    sys.exit(main())
