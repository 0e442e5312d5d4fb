"""A peer under many streams, among many pages, and while it is written to.

``streams``: Fetch with 1, 8 and 64 streams at once against a plain TCP copy over as many connections and as many bare
gRPC streams with no work of ours, in turn, in the same run, and the peer's memory meanwhile. All streams take all the
CPU they get; peer, senders and client are on one machine.

``lookup``: 1024 page hashes, all stored, one after the other in a prefix, in a store of few objects and in one of many
(``--objects``). The objects are of one byte and are written past the engine, sorted and in large transactions: a peer
never looks at them to answer a Lookup. Prefixes are spread over all of the store, each asked for once, as those of
different conversations are; the engine's own time for such keys is measured beside it. The peer has collected the sizes
of all objects by then; its first lookups, before that, are a row of their own.

``mixed``: a Fetch of a few pages, again and again, alone and while two clients put pages, some or as fast as they can,
on disk; each client is a process of its own.

``python -m benchmarks.bench_peer [--only streams,lookup,mixed] [--directory DIR]``; ``--objects 10_000_000`` takes
about 5 GB in DIR.
"""

import argparse
import contextlib
import os
import pathlib
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import grpc

from benchmarks.bench_rpc import MIB, TIMEOUTS, fetch_all, grpc_copy, make_pages, sender, tcp_copy
from benchmarks.record import record
from sglang_kvcodec.format.exchange import PutOutcome
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.rpc.limits import channel_options
from sglang_kvcodec.storage.lmdb_engine import LmdbEngine
from sglang_kvcodec.testing.peer import PeerProcess

STREAMS = 1, 8, 64
LOOKUP_PAGES = 1024
FEW_OBJECTS = 100_000
FIRST_LOOKUPS = 50
"""Of a peer that has just started: it still collects the sizes of all objects, and reads those that are asked for."""
INDEXED_PER_S = 150_000
"""Objects whose sizes it collects, at the least."""
FILLED_AT_ONCE = 200_000
FILL_NAMESPACE = bytes(range(32))
FETCHED_PAGES = 8
PUTTERS = 2
PUT_MEGABYTES = 32
PUTS = {"some puts": 40, "as many puts as can be": 0}
"""MB/s of all that put together, 0 for no bound: 40 is what 300 Mbps carry."""
CODED_BITS_PER_VALUE = 2


def rss_mib(pid, what="VmRSS"):
    """Resident memory of a process now."""
    line = next(
        line for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{what}:")
    )
    return int(line.split()[1]) / 1024


@contextlib.contextmanager
def watched_memory(pid):
    """Gives a list; after the block its one item is the most memory that the process had of its own, in MiB.

    Without files it has mapped: LMDB's is the page cache's.
    """
    peaks, ended = [0.0], threading.Event()

    def watch():
        while not ended.wait(0.01):
            peaks[0] = max(peaks[0], rss_mib(pid, "RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        ended.set()
        watcher.join()


def in_threads(count, work):
    """Runs ``work(index)`` in as many threads at once; the seconds until the last has ended, and what they gave."""
    results = [None] * count

    def one(index):
        results[index] = work(index)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    started_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started_s, results


def percentiles(seconds):
    """p50, p99 and the slowest in milliseconds."""
    ordered = sorted(seconds)
    return {
        "p50_ms": round(1e3 * statistics.median(ordered), 3),
        "p99_ms": round(1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 3),
        "slowest_ms": round(1e3 * ordered[-1], 3),
        "samples": len(ordered),
    }


def peer_process(store, capacity_bytes, *arguments):
    return PeerProcess(store, capacity=str(capacity_bytes), arguments=["--log-level", "warning", *arguments])


# ---- many streams ----


def tcp_sender(total_bytes):
    """Serves ``total_bytes`` to every connection, in pieces of 1 MiB, a thread for each."""
    piece = os.urandom(MIB)

    def serve(connection):
        with connection:
            left = total_bytes
            while left:
                left -= connection.send(piece[:left] if left < MIB else piece)

    with socket.create_server(("127.0.0.1", 0), backlog=max(STREAMS)) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            threading.Thread(target=serve, args=server.accept()[:1], daemon=True).start()


@contextlib.contextmanager
def tcp_port(total_bytes):
    """Where such a sender listens, a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_peer", "--tcp-sender", str(total_bytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@contextlib.contextmanager
def bare_channel(total_bytes):
    """To a sender of bare gRPC streams, a process of its own."""
    options = channel_options(TIMEOUTS)
    with (
        sender("grpc", total_bytes) as (_, port),
        grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel,
    ):
        yield channel


def bench_streams(directory, megabytes, rounds):
    """Every stream fetches pages of its own; the bytes in all are the same for every number of streams."""
    namespace, pages = make_pages(CODED_BITS_PER_VALUE, megabytes * MIB)
    for store in ("memory:", f"lmdb:{directory}/streams"):
        yield from streams_of(store, namespace, pages, rounds)


def streams_of(store, namespace, pages, rounds):
    hashes = [page_hash for page_hash, _ in pages]
    total_bytes = sum(len(data) for _, data in pages)
    load = os.getloadavg()[0]
    rates, memory = {}, {}
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(peer_process(store, 2 * total_bytes))
        ports = {streams: stack.enter_context(tcp_port(total_bytes // streams)) for streams in STREAMS}
        bare = {streams: stack.enter_context(bare_channel(total_bytes // streams)) for streams in STREAMS}
        peer = stack.enter_context(contextlib.closing(GrpcPeer(process.remote, TIMEOUTS)))
        assert all(result.outcome is PutOutcome.STORED for result in peer.put(namespace, pages))
        at_rest_mib = rss_mib(process.pid, "RssAnon")

        def rate(streams, work):
            elapsed_s, received = in_threads(streams, work)
            return sum(received) / elapsed_s / 1e6

        def one_turn(streams):
            tcp = rate(streams, lambda _: tcp_copy(ports[streams]))
            bare_grpc = rate(streams, lambda _: grpc_copy(bare[streams]))
            with watched_memory(process.pid) as peak:
                fetched = rate(streams, lambda index: fetch_all(peer, namespace, hashes[index::streams]))
            rates.setdefault(streams, []).append((fetched, tcp, bare_grpc))
            memory.setdefault(streams, []).append(peak[0])

        for number in range(rounds):
            for streams in STREAMS[number % len(STREAMS) :] + STREAMS[: number % len(STREAMS)]:
                one_turn(streams)
    one_stream = statistics.median(fetched for fetched, _, _ in rates[1])
    for streams, each in rates.items():
        fetch, tcp, bare_grpc = zip(*each, strict=True)
        yield {
            "what": "fetch",
            "store": store.partition(":")[0],
            "streams": streams,
            "object_bytes": len(pages[0][1]),
            "total_bytes": total_bytes,
            "load_average_before": load,
            "mb_per_s_median": round(statistics.median(fetch)),
            "mb_per_s_all": [round(value) for value in fetch],
            "tcp_mb_per_s_median": round(statistics.median(tcp)),
            "tcp_mb_per_s_all": [round(value) for value in tcp],
            "bare_grpc_mb_per_s_median": round(statistics.median(bare_grpc)),
            "bare_grpc_mb_per_s_all": [round(value) for value in bare_grpc],
            "ratio_to_tcp_median": round(statistics.median(f / t for f, t, _ in each), 3),
            "ratio_to_bare_grpc_median": round(statistics.median(f / g for f, _, g in each), 3),
            "ratio_to_one_stream": round(statistics.median(fetch) / one_stream, 3),
            "peer_own_memory_mib_peak": round(max(memory[streams]), 1),
            "peer_own_memory_mib_before": round(at_rest_mib, 1),
        }


# ---- many pages ----


def page_hash(number, objects):
    """Rising with the number, spread evenly over all hashes."""
    return (((number << 224) // objects) << 32 | number).to_bytes(32, "big")


def fill(store, objects):
    """Objects of one byte in rising order: LMDB then fills its pages from left to right. Seconds it took."""
    started_s = time.perf_counter()
    for first in range(0, objects, FILLED_AT_ONCE):
        with store._environment.writing() as transaction:
            for number in range(first, min(first + FILLED_AT_ONCE, objects)):
                transaction.add(FILL_NAMESPACE + page_hash(number, objects), b"x", store._uses.next_number())
    return time.perf_counter() - started_s


def prefixes(objects, count, seed):
    """Lists of page hashes, each of pages that lie anywhere in the store."""
    source = random.Random(seed)
    for _ in range(count):
        yield [page_hash(source.randrange(objects), objects) for _ in range(LOOKUP_PAGES)]


def time_lookups(directory, objects, lookups):
    location = directory / f"{objects}"
    with contextlib.closing(LmdbEngine(location, capacity_bytes(objects))) as store:
        filled_s = fill(store, objects)
    file_bytes = (location / "data.mdb").stat().st_size
    with (
        # A scrub would throw away what is no page object.
        peer_process(f"lmdb:{location}", capacity_bytes(objects), "--scrub-rate", "0") as process,
        contextlib.closing(GrpcPeer(process.remote, TIMEOUTS)) as peer,
    ):
        stat = peer.stat()
        early = time_calls(peer, objects, FIRST_LOOKUPS, 1)
        time.sleep(2 + objects / INDEXED_PER_S)
        calls = time_calls(peer, objects, lookups, 2)
        rss = rss_mib(process.pid)
        anonymous = rss_mib(process.pid, "RssAnon")
    alone = []
    with contextlib.closing(LmdbEngine(location, capacity_bytes(objects))) as store:
        while not store._index.is_ready:
            time.sleep(0.1)
        for hashes in prefixes(objects, lookups, 1):
            keys = [FILL_NAMESPACE + each for each in hashes]
            started_s = time.perf_counter()
            sizes = store.sizes(keys)
            alone.append(time.perf_counter() - started_s)
            assert sizes == [1] * LOOKUP_PAGES
    row = {"objects": stat.objects, "file_bytes": file_bytes, "filled_s": round(filled_s, 1)}
    row |= {"peer_rss_mib": round(rss, 1), "peer_own_memory_mib": round(anonymous, 1)}
    yield {"what": "Lookup over gRPC", **row, **percentiles(calls)}
    yield {"what": f"Lookup over gRPC, the first {FIRST_LOOKUPS} after the start", **row, **percentiles(early)}
    yield {"what": "sizes, of the engine alone", **row, **percentiles(alone)}


def time_calls(peer, objects, lookups, seed):
    calls = []
    for hashes in prefixes(objects, lookups, seed):
        started_s = time.perf_counter()
        covered = peer.lookup(FILL_NAMESPACE, hashes).covered_pages
        calls.append(time.perf_counter() - started_s)
        assert covered == LOOKUP_PAGES
    return calls


def capacity_bytes(objects):
    """Of bytes of objects; the file may be twice that and 256 MiB, and is 600 bytes for each object and its records."""
    return 400 * objects


def bench_lookup(directory, objects, lookups):
    """In a store of few objects, then in one of many."""
    load = os.getloadavg()[0]
    few = list(time_lookups(directory, min(FEW_OBJECTS, objects), lookups))
    many = list(time_lookups(directory, objects, lookups))
    for row, base in zip(few + many, few + few, strict=True):
        ratios = {f"{name}_ratio_to_few": round(row[f"{name}_ms"] / base[f"{name}_ms"], 2) for name in ("p50", "p99")}
        yield {**row, "pages": LOOKUP_PAGES, "load_average_before": load, **ratios}


# ---- reading and writing at once ----


def time_fetches(peer, namespace, hashes, total_bytes, seconds):
    times = []
    until_s = time.perf_counter() + seconds
    while (started_s := time.perf_counter()) < until_s:
        assert fetch_all(peer, namespace, hashes) == total_bytes
        times.append(time.perf_counter() - started_s)
    return times


def put_for_ever(remote, megabytes, mb_per_s):
    """Puts pages and deletes them, again and again, at a rate if one is given; prints the bytes of each."""
    namespace, pages = make_pages(CODED_BITS_PER_VALUE, megabytes * MIB)
    next_s = time.perf_counter()
    with contextlib.closing(GrpcPeer(remote, TIMEOUTS)) as peer:
        while True:
            for page in pages:
                assert peer.put(namespace, [page])[0].outcome is PutOutcome.STORED
                print(len(page[1]), flush=True)
                if mb_per_s:
                    next_s += len(page[1]) / mb_per_s / 1e6
                    time.sleep(max(0.0, next_s - time.perf_counter()))
            peer.delete(namespace, [page_hash for page_hash, _ in pages])


def time_fetches_beside_puts(process, peer, namespace, hashes, total_bytes, seconds, mb_per_s):
    """The same while two clients put, each a process; also their MB/s together."""
    command = [sys.executable, "-m", "benchmarks.bench_peer", "--putter", process.remote]
    command += ["--put-mb-per-s", str(mb_per_s / PUTTERS)]
    with contextlib.ExitStack() as stack:
        putters = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)) for _ in range(PUTTERS)
        ]
        for putter in putters:
            stack.callback(putter.kill)
            # Its first page is stored.
            putter.stdout.readline()
        started_s = time.perf_counter()
        times = time_fetches(peer, namespace, hashes, total_bytes, seconds)
        elapsed_s = time.perf_counter() - started_s
        for putter in putters:
            putter.kill()
        put_bytes = sum(int(line) for putter in putters for line in putter.stdout if line.strip())
    return times, put_bytes / elapsed_s / 1e6


def bench_mixed(directory, seconds, rounds):
    """The same Fetch alone and beside Puts, in turn."""
    namespace, pages = make_pages(CODED_BITS_PER_VALUE, FETCHED_PAGES * MIB)
    total_bytes = sum(len(data) for _, data in pages)
    hashes = [page_hash for page_hash, _ in pages]
    load, ways = os.getloadavg()[0], {"alone": None, **{f"beside {name}": rate for name, rate in PUTS.items()}}
    times, put_rates = {way: [] for way in ways}, {way: [0.0] for way in ways}
    with (
        peer_process(f"lmdb:{directory}/mixed", 1 << 30) as process,
        contextlib.closing(GrpcPeer(process.remote, TIMEOUTS)) as peer,
    ):
        peer.put(namespace, pages)
        for _ in range(rounds):
            times["alone"] += time_fetches(peer, namespace, hashes, total_bytes, seconds)
            for way, mb_per_s in ways.items():
                if mb_per_s is not None:
                    each, rate = time_fetches_beside_puts(
                        process, peer, namespace, hashes, total_bytes, seconds, mb_per_s
                    )
                    times[way] += each
                    put_rates[way].append(rate)
    alone = percentiles(times["alone"])
    for way, each in times.items():
        row = percentiles(each)
        yield {
            "what": f"Fetch of {len(pages)} pages, {way}",
            "fetched_bytes": total_bytes,
            "load_average_before": load,
            **row,
            "p50_ratio_to_alone": round(row["p50_ms"] / alone["p50_ms"], 2),
            "p99_ratio_to_alone": round(row["p99_ms"] / alone["p99_ms"], 2),
            "put_mb_per_s_median": round(statistics.median(put_rates[way][1:] or put_rates[way])),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="streams,lookup,mixed")
    parser.add_argument("--directory", type=pathlib.Path, help="on the disk to measure; default: a temporary directory")
    parser.add_argument("--megabytes", type=int, default=512, help="of pages that the streams fetch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--objects", type=int, default=10_000_000)
    parser.add_argument("--lookups", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each turn of fetches")
    parser.add_argument("--dry", action="store_true", help="print, but keep no result")
    parser.add_argument("--tcp-sender", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--putter", help=argparse.SUPPRESS)
    parser.add_argument("--put-mb-per-s", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tcp_sender:
        tcp_sender(arguments.tcp_sender)
    if arguments.putter:
        put_for_ever(arguments.putter, PUT_MEGABYTES, arguments.put_mb_per_s)
    parts = {
        "streams": lambda where: bench_streams(where, arguments.megabytes, arguments.rounds),
        "lookup": lambda where: bench_lookup(where, arguments.objects, arguments.lookups),
        "mixed": lambda where: bench_mixed(where, arguments.seconds, arguments.rounds),
    }
    rows = []
    for part in arguments.only.split(","):
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            for row in parts[part](pathlib.Path(directory)):
                print(row, flush=True)
                rows.append(row)
    if not arguments.dry:
        print(record("peer", rows))


if __name__ == "__main__":
    main()
