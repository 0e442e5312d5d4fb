"""Kills a peer with SIGKILL at random moments while it stores and evicts, and checks that it keeps its promises.

python -m benchmarks.kill_peer [--kills 200] [--store lmdb:DIR] [--seed 1]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import tempfile

from sglang_kvcodec.testing.kills import KillReport, kill_again_and_again
from sglang_kvcodec.testing.peer import PeerProcess

CAPACITY_BYTES = 3_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--store", help="a store that outlives the peer; by default lmdb in a directory for the time")
    arguments = parser.parse_args()

    def show(report: KillReport) -> None:
        if report.kills % 10 == 0:
            print(f"{report.kills} kills, {report.acknowledged} objects acknowledged", flush=True)

    with tempfile.TemporaryDirectory() as directory:
        store = arguments.store or f"lmdb:{pathlib.Path(directory) / 'store'}"
        with PeerProcess(store, str(CAPACITY_BYTES), arguments=("--log-level", "error")) as process:
            report = kill_again_and_again(process, CAPACITY_BYTES, arguments.kills, arguments.seed, on_kill=show)
    print(json.dumps(dataclasses.asdict(report)))


if __name__ == "__main__":
    main()
