"""Throughput of peer and client over loopback, against a plain TCP socket copy of the same bytes in the same run.

A bare gRPC stream of bytes, with the same options and no work of ours, shows how much of the distance is gRPC's.

Peer, TCP sender and client are processes of their own. The store is in memory, so that no disk is measured; ``lmdb`` is
the same on a disk, as far as the page cache holds it. ``fetch_N`` has N streams at once that take all the CPU they get:
where one stream fills the machine, several can't be faster. ``paced_N`` has N streams that each read at most
``PACE_MB_PER_S``, as over a link of their own: what several carry where the CPU is not what bounds them.

``python -m benchmarks.bench_rpc [--megabytes 256] [--rounds 5]``
"""

import argparse
import asyncio
import collections
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import grpc

from benchmarks.record import record
from sglang_kvcodec.config import Timeouts
from sglang_kvcodec.format.exchange import PutOutcome
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import SideData, build_page_object
from sglang_kvcodec.format.spec import KVDtype, KVSpec, layer_groups
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.rpc.limits import DEFAULT_MESSAGE_BYTES, channel_options, server_options
from sglang_kvcodec.testing.peer import PeerProcess

SPEC = KVSpec(layers=32, kv_heads=8, head_dim=128, page_tokens=64, dtype=KVDtype.BFLOAT16)
"""An 8B model."""
BITS_PER_VALUE = {"coded": 2, "raw": 16, "lmdb": 2}
STREAMS = 1, 2, 4
PACE_MB_PER_S = 125
"""1 Gbit/s."""
MIB = 1 << 20
TIMEOUTS = Timeouts(progress_s=30, fetch_s=300, put_s=300)


def make_pages(bits_per_value, total_bytes):
    """``(page_hash, object)`` pairs of about ``total_bytes``, with the parts that pages of this density have."""
    namespace = os.urandom(32)
    groups = [
        {
            side: SideData(stored=os.urandom(group.layers * SPEC.layer_values * bits_per_value // 8))
            for side in SPEC.sides
        }
        for group in layer_groups(SPEC)
    ]
    pages = []
    while sum(len(data) for _, data in pages) < total_bytes:
        page_hash = os.urandom(32)
        pages.append((page_hash, build_page_object(PageKey(namespace, page_hash), SPEC, "raw", groups)))
    return namespace, pages


def tcp_sender(total_bytes):
    """Serves ``total_bytes`` to every connection, in pieces of 1 MiB."""
    piece = os.urandom(MIB)
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                left = total_bytes
                while left:
                    left -= connection.send(piece[:left] if left < MIB else piece)


def grpc_sender(total_bytes):
    """Serves the same as a gRPC stream of bytes without any work of ours: what Python's gRPC allows at best."""
    piece = os.urandom(DEFAULT_MESSAGE_BYTES)

    async def send(_request, context):
        for _ in range(total_bytes // len(piece)):
            await context.write(piece)

    async def serve():
        server = grpc.aio.server(options=server_options())
        methods = {"Send": grpc.unary_stream_rpc_method_handler(send)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Bare", methods),))
        print(server.add_insecure_port("127.0.0.1:0"), flush=True)
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


def grpc_copy(channel):
    return sum(map(len, channel.unary_stream("/Bare/Send")(b"")))


def tcp_copy(port):
    received, buffer = 0, bytearray(MIB)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        while size := connection.recv_into(buffer):
            received += size
    return received


def fetch_all(peer, namespace, hashes, pace_mb_per_s=None):
    received, started = 0, time.perf_counter()
    for event in peer.fetch(namespace, hashes):
        received += len(event.header) if hasattr(event, "header") else len(event.data)
        if pace_mb_per_s:
            time.sleep(max(0.0, started + received / pace_mb_per_s / 1e6 - time.perf_counter()))
    return received


def cpu_seconds(pid):
    """What all threads of a process have taken, by the clock of clock_getcpuclockid(3): /proc counts in ticks."""
    return time.clock_gettime(~pid << 3 | 2)


def rate(function, other_pid):
    """MB/s, and CPU seconds per GB of the other process and of this one."""
    pids = other_pid, os.getpid()
    started = time.perf_counter()
    before = [cpu_seconds(pid) for pid in pids]
    size_bytes = function()
    elapsed_s = time.perf_counter() - started
    after = [cpu_seconds(pid) for pid in pids]
    return size_bytes / elapsed_s / 1e6, *((b - a) / size_bytes * 1e9 for a, b in zip(before, after, strict=True))


def fetch_rate(peer, pid, namespace, hashes, streams, pace_mb_per_s=None):
    """All pages, split among ``streams`` calls at once."""
    received = [0] * streams

    def one(index):
        received[index] = fetch_all(peer, namespace, hashes[index::streams], pace_mb_per_s)

    def every():
        threads = [threading.Thread(target=one, args=(index,)) for index in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(received)

    return rate(every, pid)


def put_rate(peer, pid, namespace, pages):
    peer.delete(namespace, [page_hash for page_hash, _ in pages])

    def put():
        results = peer.put(namespace, pages)
        assert all(result.outcome is PutOutcome.STORED for result in results), results
        return sum(len(data) for _, data in pages)

    return rate(put, pid)


@contextlib.contextmanager
def sender(kind, total_bytes):
    command = [sys.executable, "-m", "benchmarks.bench_rpc", f"--{kind}-sender", str(total_bytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.pid, int(process.stdout.readline())
        finally:
            process.kill()


def measure(kind, total_bytes, rounds):
    namespace, pages = make_pages(BITS_PER_VALUE[kind], total_bytes)
    hashes = [page_hash for page_hash, _ in pages]
    total_bytes = sum(len(data) for _, data in pages)
    # A machine with other work favours the socket: gRPC has several threads to run on either side.
    load = os.getloadavg()[0]
    rates = collections.defaultdict(list)
    with (
        tempfile.TemporaryDirectory() as directory,
        sender("tcp", total_bytes) as (tcp_pid, tcp_port),
        sender("grpc", total_bytes) as (grpc_pid, grpc_port),
        grpc.insecure_channel(f"127.0.0.1:{grpc_port}", options=channel_options(TIMEOUTS)) as channel,
        PeerProcess(
            f"lmdb:{directory}/store" if kind == "lmdb" else "memory:",
            capacity=str(2 * total_bytes),
            arguments=["--log-level", "warning"],
        ) as process,
        contextlib.closing(GrpcPeer(process.remote, TIMEOUTS)) as peer,
    ):
        for number in range(rounds):
            rates["tcp"].append(rate(lambda: tcp_copy(tcp_port), tcp_pid))
            if kind != "lmdb":
                rates["bare_grpc"].append(rate(lambda: grpc_copy(channel), grpc_pid))
            if kind != "lmdb" or not rates["put"]:
                rates["put"].append(put_rate(peer, process.pid, namespace, pages))
            # In turn, for the first fetch after a put finds nothing in the caches.
            for streams in STREAMS[number % len(STREAMS) :] + STREAMS[: number % len(STREAMS)]:
                rates[f"fetch_{streams}"].append(fetch_rate(peer, process.pid, namespace, hashes, streams))
            for streams in (1, 4) if kind == "coded" else ():
                some = hashes[:: 4 // streams]
                paced = fetch_rate(peer, process.pid, namespace, some, streams, PACE_MB_PER_S)
                rates[f"paced_{streams}"].append(paced)
    for name, rows in rates.items():
        values, peer_cpu, client_cpu = zip(*rows, strict=True)
        ratios = [value / tcp for value, (tcp, _, _) in zip(values, rates["tcp"], strict=False)]
        one_stream = rates.get(f"{name.partition('_')[0]}_1", [])
        over_one = [value / one for value, (one, _, _) in zip(values, one_stream, strict=False)]
        yield {
            "pages": kind,
            "objects": len(pages),
            "object_bytes": len(pages[0][1]),
            "load_average_before": load,
            "what": name,
            "mb_per_s_median": round(statistics.median(values)),
            "mb_per_s_all": [round(value) for value in values],
            "ratio_to_tcp_median": round(statistics.median(ratios), 3),
            "ratio_to_one_stream_median": round(statistics.median(over_one), 3) if over_one else None,
            "peer_cpu_s_per_gb": round(statistics.median(peer_cpu), 2),
            "client_cpu_s_per_gb": round(statistics.median(client_cpu), 2),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="print, but keep no result")
    parser.add_argument("--tcp-sender", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--grpc-sender", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tcp_sender:
        tcp_sender(arguments.tcp_sender)
    if arguments.grpc_sender:
        grpc_sender(arguments.grpc_sender)
    rows = [row for kind in BITS_PER_VALUE for row in measure(kind, arguments.megabytes * MIB, arguments.rounds)]
    for row in rows:
        over_one = row["ratio_to_one_stream_median"]
        print(
            f"{row['pages']:6} {row['what']:9} {row['mb_per_s_median']:6} MB/s, {row['ratio_to_tcp_median']:.2f} of TCP"
            f"{f', {over_one:.2f} of one stream' if over_one else ''}; "
            f"CPU s/GB: peer {row['peer_cpu_s_per_gb']:.2f}, client {row['client_cpu_s_per_gb']:.2f}"
        )
    if not arguments.dry:
        print(record("rpc", rows))


if __name__ == "__main__":
    main()
