"""Kills a peer with SIGKILL at random moments while it stores and evicts, and checks that it keeps its promises.

python -m benchmarks.kill_peer [--kills 200] [--store lmdb:DIR] [--seed 1] [--dry]
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import tempfile

from benchmarks.record import record
from sglang_kvcodec.testing.kills import KillReport, kill_again_and_again
from sglang_kvcodec.testing.peer import PeerProcess

CAPACITY_BYTES = 3_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--store", help="a store that outlives the peer; by default lmdb in a directory for the time")
    parser.add_argument("--dry", action="store_true", help="print, but keep no result")
    arguments = parser.parse_args()

    def show(report: KillReport) -> None:
        if report.kills % 10 == 0:
            print(f"{report.kills} kills, {report.acknowledged} objects acknowledged", flush=True)

    with tempfile.TemporaryDirectory() as directory:
        store = arguments.store or f"lmdb:{pathlib.Path(directory) / 'store'}"
        with PeerProcess(store, str(CAPACITY_BYTES), arguments=("--log-level", "error")) as process:
            report = kill_again_and_again(process, CAPACITY_BYTES, arguments.kills, arguments.seed, on_kill=show)
    # Where a store is does not say what it is.
    row = {"engine": store.partition(":")[0], "seed": arguments.seed, **dataclasses.asdict(report)}
    print(row)
    if not arguments.dry:
        print(record("kill-peer", [row]))


if __name__ == "__main__":
    main()
