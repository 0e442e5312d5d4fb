"""Two peers with the same pages, one of them slower or farther: a fetch from both against the better one alone.

Each peer is a process behind a relay that gives its link a speed and a round trip. ``over_better``: the time of a fetch
over that from the better peer alone in the same round. ``first`` is of a client that has fetched nothing before, and so
asks both for as many pages; ``next`` of one that has. ``over_ideal``: over all pages at the speed of both links
together.

``python -m benchmarks.bench_several_peers [--megabytes 16] [--rounds 5]``
"""

import argparse
import contextlib
import statistics
import time

from benchmarks.bench_rpc import TIMEOUTS, make_pages
from benchmarks.record import record
from sglang_kvcodec.format.exchange import FetchedFragment
from sglang_kvcodec.rpc.connect import connect
from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.testing.shaped_link import ShapedLink, steady

BITS_PER_VALUE = 2
MBPS = 1e6 / 8
CASES = {
    "alike": ((400, 1), (400, 1)),
    "half as fast": ((400, 1), (200, 1)),
    "a tenth as fast": ((400, 1), (40, 1)),
    "80 ms away": ((400, 1), (400, 80)),
}
"""Name -> Mbit/s and round trip in ms of either link."""


def fetch_s(peer, namespace, hashes):
    """Seconds of a Lookup and a Fetch of all pages."""
    started = time.perf_counter()
    peer.lookup(namespace, hashes)
    events = list(peer.fetch(namespace, hashes))
    seconds = time.perf_counter() - started
    assert {event.page_index for event in events if isinstance(event, FetchedFragment)} == set(range(len(hashes)))
    return seconds


def measure(case, links, pages, namespace, rounds):
    hashes = [page_hash for page_hash, _ in pages]
    size_bytes = sum(len(data) for _, data in pages)
    samples = {"better alone": [], "first": [], "next": []}
    with contextlib.ExitStack() as stack:
        remotes = []
        for mbps, round_trip_ms in links:
            process = stack.enter_context(PeerProcess("memory:"))
            link = ShapedLink(process.address, steady(mbps * MBPS), round_trip_ms / 1e3)
            remotes.append(stack.enter_context(link).remote)
        both = "grpc://" + ",".join(remote.removeprefix("grpc://") for remote in remotes)
        with contextlib.closing(connect(both, TIMEOUTS, 2)) as peer:
            peer.put(namespace, pages)
        for _ in range(rounds):
            with contextlib.closing(connect(remotes[0], TIMEOUTS, 1)) as peer:
                fetch_s(peer, namespace, hashes[:1])
                samples["better alone"].append(fetch_s(peer, namespace, hashes))
            with contextlib.closing(connect(both, TIMEOUTS, 2)) as peer:
                fetch_s(peer, namespace, hashes[:1])
                samples["first"].append(fetch_s(peer, namespace, hashes))
                fetch_s(peer, namespace, hashes)
                samples["next"].append(fetch_s(peer, namespace, hashes))
    ideal_s = size_bytes / (sum(mbps for mbps, _ in links) * MBPS)
    for name, seconds in samples.items():
        ratios = [each / better for each, better in zip(seconds, samples["better alone"], strict=True)]
        yield {
            "case": case,
            "links_mbps_and_round_trip_ms": links,
            "fetch": name,
            "bytes": size_bytes,
            "pages": len(pages),
            "rounds": rounds,
            "seconds_median": round(statistics.median(seconds), 4),
            "over_better": round(statistics.median(ratios), 3),
            "over_better_worst": round(max(ratios), 3),
            "over_ideal": round(statistics.median(seconds) / ideal_s, 3),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="keep no result")
    options = parser.parse_args()
    namespace, pages = make_pages(BITS_PER_VALUE, options.megabytes << 20)
    rows = []
    for case, links in CASES.items():
        for row in measure(case, links, pages, namespace, options.rounds):
            rows.append(row)
            print(
                f"{case:16} {row['fetch']:13} {row['seconds_median']:.3f} s  {row['over_better']:.2f} of the better "
                f"(worst {row['over_better_worst']:.2f}), {row['over_ideal']:.2f} of both links",
                flush=True,
            )
    if not options.dry:
        print(f"kept in {record('several-peers', rows)}")


if __name__ == "__main__":
    main()
