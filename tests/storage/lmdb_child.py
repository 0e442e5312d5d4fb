"""A process that puts objects into an LMDB store until it is killed, and says which are in.

Arguments: directory, capacity in bytes, number of the first object. Prints a line per acknowledged put.
"""

import pathlib
import random
import sys

from sglang_kvcodec.storage.lmdb_engine import LmdbEngine
from sglang_kvcodec.testing.storage import make_key, make_value


def nth_value(i: int) -> bytes:
    return make_value(i, random.Random(i).choice([0, 50, 3_000, 20_000, 120_000]))


def nth_read(i: int) -> list[bytes]:
    """The keys that are looked up before the i-th put, some of them evicted long ago."""
    return [make_key(i - 1 - random.Random(-i).randrange(40)), make_key(i - 3)]


def main() -> None:
    engine = LmdbEngine(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
    i = int(sys.argv[3])
    while True:
        engine.sizes(nth_read(i))
        engine.put(make_key(i), nth_value(i))
        print(i, flush=True)
        i += 1


if __name__ == "__main__":
    main()
