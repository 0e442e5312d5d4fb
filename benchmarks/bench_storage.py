"""Storage engines against a plain file (write and fsync) and a dict, in one run.

python benchmarks/bench_storage.py [--directory DIR]    DIR on the disk to measure; default: a temporary directory
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable

from record import record

from sglang_kvcodec.storage.lmdb_engine import LmdbEngine
from sglang_kvcodec.storage.memory import MemoryEngine

OBJECT_BYTES = 100 << 10
PUTS = 400
SMALL_OBJECTS = 100_000
SMALL_BYTES = 100
LOOKUP_KEYS = 1024
ROUNDS = 5


def key_of(i: int) -> bytes:
    return hashlib.sha512(b"%d" % i).digest()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def filesystem_of(directory: pathlib.Path) -> str:
    mounts = [line.split() for line in pathlib.Path("/proc/mounts").read_text().splitlines()]
    inside = [fields for fields in mounts if directory.resolve().is_relative_to(fields[1])]
    return max(inside, key=lambda fields: len(fields[1]))[2]


def write_files(directory: pathlib.Path, keys: list[bytes], values: list[bytes]) -> None:
    for key, value in zip(keys, values, strict=True):
        with (directory / key.hex()).open("wb", buffering=0) as file:
            file.write(value)
            os.fsync(file.fileno())


def put_all(engine, keys: list[bytes], values: list[bytes]) -> None:
    for key, value in zip(keys, values, strict=True):
        assert engine.put(key, value)


def rate_row(what: str, engine: str, baseline: str, rates: list[float], baseline_rates: list[float]) -> dict:
    rate, base = statistics.median(rates), statistics.median(baseline_rates)
    return {
        "what": what,
        "engine": engine,
        "object_bytes": OBJECT_BYTES,
        "per_s": round(rate, 1),
        "megabytes_per_s": round(rate * OBJECT_BYTES / 1e6, 1),
        "spread": [round(min(rates), 1), round(max(rates), 1)],
        "baseline": baseline,
        "baseline_per_s": round(base, 1),
        "ratio": round(rate / base, 4),
    }


def _one_round(directory, turn: int, values: list[bytes], full, memory_full, measure) -> None:
    keys = [key_of(turn * PUTS + i) for i in range(PUTS)]
    plain = dict(zip(keys, values, strict=True))
    files = directory / f"files{turn}"
    files.mkdir()
    empty = LmdbEngine(directory / f"empty{turn}", 4 * PUTS * OBJECT_BYTES)
    threaded = LmdbEngine(directory / f"threaded{turn}", 4 * PUTS * OBJECT_BYTES)
    measure("files put", lambda: write_files(files, keys, values))
    measure("lmdb put", lambda: put_all(empty, keys, values))
    measure("lmdb put evicting", lambda: put_all(full, keys, values))
    measure("memory put", lambda: put_all(memory_full, keys, values))

    def put_from_threads() -> None:
        threads = [
            threading.Thread(target=put_all, args=(threaded, keys[part::4], values[part::4])) for part in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    measure("lmdb put threads", put_from_threads)
    order = random.Random(turn).sample(keys, PUTS)
    measure("files get", lambda: [(files / key.hex()).read_bytes() for key in order])
    # An engine on a disk hands out a copy, a dict its own object.
    measure("dict get and copy", lambda: [bytearray(plain[key]) for key in order])
    measure("dict get", lambda: [plain[key] for key in order])
    measure("lmdb get", lambda: [empty.get(key) for key in order])
    measure("memory get", lambda: [memory_full.get(key) for key in order])
    empty.close()
    threaded.close()


def bench_objects(directory: pathlib.Path) -> list[dict]:
    """Puts into an empty store and into a full one, and gets, in rounds that take turns with their baselines."""
    values = [random.Random(i).randbytes(OBJECT_BYTES) for i in range(PUTS)]
    rates: dict[str, list[float]] = {}

    def measure(name: str, work: Callable[[], object]) -> None:
        rates.setdefault(name, []).append(PUTS / seconds(work))

    capacity_bytes = PUTS * OBJECT_BYTES
    full = LmdbEngine(directory / "full", capacity_bytes)
    memory_full = MemoryEngine(capacity_bytes)
    put_all(full, [key_of(-1 - i) for i in range(PUTS)], values)
    for turn in range(ROUNDS):
        _one_round(directory, turn, values, full, memory_full, measure)
    file_bytes = (directory / "full" / "data.mdb").stat().st_size
    full.close()
    rows = [
        rate_row("put, synced, empty store", "lmdb", "file write+fsync", rates["lmdb put"], rates["files put"]),
        rate_row(
            "put, synced, full store: each evicts",
            "lmdb",
            "file write+fsync",
            rates["lmdb put evicting"],
            rates["files put"],
        ),
        rate_row("put, synced, 4 threads", "lmdb", "file write+fsync", rates["lmdb put threads"], rates["files put"]),
        rate_row("put, full store: each evicts", "memory", "file write+fsync", rates["memory put"], rates["files put"]),
        rate_row("get, cached", "lmdb", "file read", rates["lmdb get"], rates["files get"]),
        rate_row("get, cached", "lmdb", "dict and a copy", rates["lmdb get"], rates["dict get and copy"]),
        rate_row("get, by reference", "memory", "dict", rates["memory get"], rates["dict get"]),
    ]
    rows[1]["file_to_capacity"] = round(file_bytes / capacity_bytes, 3)
    return rows


def bench_lookup(directory: pathlib.Path) -> list[dict]:
    """``sizes`` of 1024 keys, every other one stored, in a store with 100 000 objects; and opening that store."""
    capacity_bytes = 2 * SMALL_OBJECTS * SMALL_BYTES
    lmdb_engine = LmdbEngine(directory / "small", capacity_bytes)
    memory = MemoryEngine(capacity_bytes)
    plain = {key_of(i): bytes(SMALL_BYTES) for i in range(SMALL_OBJECTS)}
    for engine in (lmdb_engine, memory):
        put_all(engine, list(plain), list(plain.values()))
    times: dict[str, list[float]] = {"dict": [], "lmdb": [], "memory": []}

    def one_round(turn: int) -> None:
        pick = random.Random(turn)
        keys = [key_of(pick.randrange(SMALL_OBJECTS) + SMALL_OBJECTS * (i % 2)) for i in range(LOOKUP_KEYS)]
        times["dict"].append(
            seconds(lambda: [None if (value := plain.get(key)) is None else len(value) for key in keys])
        )
        times["lmdb"].append(seconds(lambda: lmdb_engine.sizes(keys)))
        times["memory"].append(seconds(lambda: memory.sizes(keys)))

    for turn in range(40):
        one_round(turn)
    lmdb_engine.close()
    opening_s = seconds(lambda: LmdbEngine(directory / "small", capacity_bytes).close())
    rows: list[dict] = [
        {
            "what": f"sizes of {LOOKUP_KEYS} keys among {SMALL_OBJECTS} objects of {SMALL_BYTES} bytes",
            "engine": name,
            "ms": round(1e3 * statistics.median(times[name]), 3),
            "slowest_ms": round(1e3 * max(times[name]), 3),
            "baseline": "dict",
            "baseline_ms": round(1e3 * statistics.median(times["dict"]), 3),
            "ratio": round(statistics.median(times[name]) / statistics.median(times["dict"]), 2),
        }
        for name in ("lmdb", "memory")
    ]
    rows.append(
        {"what": f"open and close with {SMALL_OBJECTS} objects", "engine": "lmdb", "ms": round(1e3 * opening_s, 3)}
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=pathlib.Path, default=None)
    rows: list[dict] = []
    # 100 000 synced puts take minutes on a disk, and looking up what is cached does not touch it.
    for bench, where in ((bench_objects, parser.parse_args().directory), (bench_lookup, pathlib.Path("/dev/shm"))):
        with tempfile.TemporaryDirectory(dir=where) as name:
            directory = pathlib.Path(name)
            rows += [{**row, "filesystem": filesystem_of(directory)} for row in bench(directory)]
    for row in rows:
        print(row)
    print(record("storage", rows))


if __name__ == "__main__":
    main()
