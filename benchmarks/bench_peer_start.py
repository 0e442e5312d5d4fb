"""How soon a peer answers again after it was killed in the middle of puts and evictions, with a full store on disk.

The store is filled past the engine, in large transactions, with objects of one MiB up to its capacity, so that each Put
evicts. Then, again and again: two clients put, the peer gets SIGKILL at a random moment, the kernel's page cache is
dropped where that is allowed, and a peer is started. Its times count from the start of the process: until it says that
it is ready, until it has answered a Lookup of 1024 pages and has sent a page. A peer with an empty store is started in
turn: that is what Python and its imports take.

``python -m benchmarks.bench_peer_start [--stored 50GB] [--kills 20] [--directory DIR]``
"""

import argparse
import contextlib
import os
import pathlib
import random
import statistics
import tempfile
import threading
import time

from benchmarks.bench_peer import FILL_NAMESPACE, peer_process
from benchmarks.bench_rpc import MIB, TIMEOUTS, make_pages
from benchmarks.record import record
from sglang_kvcodec.config import parse_bytes
from sglang_kvcodec.errors import PeerError
from sglang_kvcodec.format.exchange import FetchedHeader
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.storage.lmdb_engine import LmdbEngine

PAGES = 1024
BITS_PER_VALUE = 2
FILLED_AT_ONCE = 256
DROP_CACHES = pathlib.Path("/proc/sys/vm/drop_caches")
LONGEST_PUTS_S = 2.0


def drop_caches():
    """Has the kernel forget the store's file, and Python's, as after the machine's start; False if it may not."""
    os.sync()
    try:
        DROP_CACHES.write_text("3\n")
    except OSError:
        return False
    return True


def fill(location, stored_bytes):
    """Hashes of all objects, of which those in the middle are pages of ``namespace``, and the seconds it took."""
    namespace, pages = make_pages(BITS_PER_VALUE, PAGES * MIB)
    value = pages[0][1]
    count = stored_bytes // len(value)
    objects = [(FILL_NAMESPACE + os.urandom(32), value) for _ in range(count - len(pages))]
    # Neither what is evicted first nor what was put last.
    objects[count // 2 : count // 2] = [(namespace + page_hash, data) for page_hash, data in pages]
    started_s = time.perf_counter()
    with contextlib.closing(LmdbEngine(location, stored_bytes)) as store:
        for first in range(0, count, FILLED_AT_ONCE):
            with store._environment.writing() as transaction:
                for key, data in objects[first : first + FILLED_AT_ONCE]:
                    transaction.add(key, data, store._uses.next_number())
            print(f"\r{min(first + FILLED_AT_ONCE, count)} of {count} objects", end="", flush=True)
    print()
    return namespace, [page_hash for page_hash, _ in pages], count, time.perf_counter() - started_s


def put_until_killed(process):
    with contextlib.closing(GrpcPeer(process.remote, TIMEOUTS)) as peer, contextlib.suppress(PeerError):
        while True:
            peer.put(*make_pages(BITS_PER_VALUE, 8 * MIB))


def kill_in_puts(process, source):
    """Whether it evicted for them meanwhile."""
    with contextlib.closing(GrpcPeer(process.remote, TIMEOUTS)) as peer:
        before = peer.stat().evicted_objects
        writers = [threading.Thread(target=put_until_killed, args=(process,)) for _ in range(2)]
        for writer in writers:
            writer.start()
        time.sleep(source.uniform(1.0, LONGEST_PUTS_S))
        has_evicted = peer.stat().evicted_objects > before
        process.kill()
        for writer in writers:
            writer.join()
    return has_evicted


def start(store, capacity_bytes, namespace, hashes):
    """The process, and the seconds until it was ready, had answered a Lookup and had sent a page."""
    started_s = time.perf_counter()
    # The scrub would drop what is no page.
    process = peer_process(store, capacity_bytes, "--scrub-rate", "0")
    times = [time.perf_counter() - started_s]
    with contextlib.closing(GrpcPeer(process.remote, TIMEOUTS)) as peer:
        peer.lookup(namespace, hashes)
        times.append(time.perf_counter() - started_s)
        events = list(peer.fetch(namespace, hashes[:1]))
        times.append(time.perf_counter() - started_s)
    return process, times, any(isinstance(event, FetchedHeader) for event in events)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored", type=parse_bytes, default=parse_bytes("50GB"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--directory", type=pathlib.Path, help="on the disk to measure; default: a temporary directory")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="print, but keep no result")
    arguments = parser.parse_args()
    source = random.Random(arguments.seed)
    times, dropped, evicted, found = {"full": [], "empty": []}, [], [], []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        location = pathlib.Path(directory) / "store"
        namespace, hashes, objects, filled_s = fill(location, arguments.stored)
        store = f"lmdb:{location}"
        process, _, _ = start(store, arguments.stored, namespace, hashes)
        for number in range(arguments.kills):
            try:
                evicted.append(kill_in_puts(process, source))
            finally:
                process.kill()
            dropped.append(drop_caches())
            empty, seconds, _ = start("memory:", arguments.stored, namespace, hashes)
            empty.kill()
            times["empty"].append(seconds)
            dropped.append(drop_caches())
            process, seconds, is_there = start(store, arguments.stored, namespace, hashes)
            times["full"].append(seconds)
            found.append(is_there)
            print(f"start {number + 1}: ready {seconds[0]:.2f} s, page {seconds[2]:.2f} s", flush=True)
        process.kill()
        file_bytes = (location / "data.mdb").stat().st_size
    base = statistics.median(each[0] for each in times["empty"])
    rows = [
        {
            "store": name,
            "stored_bytes": arguments.stored if name == "full" else 0,
            "objects": objects if name == "full" else 0,
            "file_bytes": file_bytes if name == "full" else 0,
            "filled_s": round(filled_s, 1) if name == "full" else 0,
            "kills": arguments.kills,
            "kills_while_evicting": sum(evicted),
            "page_cache_dropped": all(dropped),
            "pages_found": sum(found),
            **{
                f"{until}_s_{figure}": round(of([each[index] for each in seconds]), 3)
                for index, until in enumerate(("ready", "lookup_of_1024_pages", "page_sent"))
                for figure, of in (("median", statistics.median), ("slowest", max))
            },
            "ready_ratio_to_empty": round(statistics.median(each[0] for each in seconds) / base, 3),
        }
        for name, seconds in times.items()
    ]
    for row in rows:
        print(row)
    if not arguments.dry:
        print(record("peer-start", rows))


if __name__ == "__main__":
    main()
