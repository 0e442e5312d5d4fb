"""``kvcodec calibrations``: lists, gets, puts and removes the calibration artifacts of storage peers."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import pathlib
from collections.abc import Callable, Iterator

from tqdm import tqdm

from sglang_kvcodec.cli.digest_argument import digest
from sglang_kvcodec.cli.peer_access import access, add_access_arguments
from sglang_kvcodec.config import MAX_ARTIFACT_BYTES, Timeouts
from sglang_kvcodec.errors import ConfigurationError, NotFoundError
from sglang_kvcodec.format.digest import artifact_digest
from sglang_kvcodec.format.exchange import CalibrationEntry, PeerTransport
from sglang_kvcodec.rpc.connect import connect

_TIMEOUTS = Timeouts(connect_s=5.0, calibration_s=3600.0)
"""Longer than a server's: somebody watches, and can end it."""
_BAR_FROM_BYTES = 8 << 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``calibrations`` to the command."""
    parser = subparsers.add_parser(
        "calibrations",
        help="list, get, put and remove calibrations of peers",
        description="Lists, gets, puts and removes the calibrations of storage peers: of several, of all that answer.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    ls = _add_command(commands, "ls", _list, "list all calibrations")
    ls.add_argument("--json", action="store_true", help="print a JSON array")

    get = _add_command(commands, "get", _get, "write a model's calibration to a file")
    _add_digest(get, "model_digest", "whose calibration")
    get.add_argument("file", metavar="FILE", type=pathlib.Path, help="file to write")
    _add_digest(get, "--digest", "which one; by default the one that was put last")
    get.add_argument("--force", action="store_true", help="overwrite FILE")

    put = _add_command(commands, "put", _put, "store a file as a model's calibration, from now on its current one")
    _add_digest(put, "model_digest", "the model it is for")
    put.add_argument("file", metavar="FILE", type=pathlib.Path, help="file to store")

    rm = _add_command(commands, "rm", _remove, "remove a calibration: pages coded with it can't be read without it")
    _add_digest(rm, "model_digest", "whose calibration")
    _add_digest(rm, "digest", "which one")


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace, PeerTransport], None],
    words: str,
) -> argparse.ArgumentParser:
    def connect_and_run(arguments: argparse.Namespace) -> int:
        with contextlib.closing(connect(arguments.remote, _TIMEOUTS, access=access(arguments))) as peer:
            run(arguments, peer)
        return 0

    parser = commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")
    parser.add_argument("--remote", metavar="URL", required=True, help="grpc://HOST:PORT[,HOST:PORT...]; grpcs: TLS")
    add_access_arguments(parser)
    parser.set_defaults(run=connect_and_run)
    return parser


def _add_digest(parser: argparse.ArgumentParser, name: str, words: str) -> None:
    metavar = name.lstrip("-").upper()
    parser.add_argument(name, metavar=metavar, type=digest, help=f"{words} (64 hexadecimal digits)")


def _list(arguments: argparse.Namespace, peer: PeerTransport) -> None:
    entries = peer.list_calibrations()
    if arguments.json:
        print(json.dumps([_as_json(entry) for entry in entries], indent=2))
        return
    if not entries:
        print("no calibrations")
        return
    print(f"{'MODEL':64}  {'CALIBRATION':64}  {'BYTES':>10}  {'STORED':20}")
    for entry in entries:
        mark = "  current" if entry.is_current else ""
        print(
            f"{entry.model_digest.hex()}  {entry.digest.hex()}  {entry.size_bytes:>10}  {_stored_at(entry)}{mark}",
        )


def _get(arguments: argparse.Namespace, peer: PeerTransport) -> None:
    if arguments.file.exists() and not arguments.force:
        raise ConfigurationError(f"{arguments.file} exists; --force overwrites it")
    with _bar("get") as progress:
        artifact = peer.get_calibration(arguments.model_digest, arguments.digest, progress)
    if artifact is None:
        which = f"calibration {arguments.digest.hex()}" if arguments.digest else "calibration"
        raise NotFoundError(f"{arguments.remote} has no {which} for model {arguments.model_digest.hex()}")
    unfinished = arguments.file.with_name(arguments.file.name + ".part")
    try:
        try:
            unfinished.write_bytes(artifact)
            os.replace(unfinished, arguments.file)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigurationError(f"can't write {arguments.file}: {error.strerror}") from error
    print(artifact_digest(artifact).hex())


def _put(arguments: argparse.Namespace, peer: PeerTransport) -> None:
    try:
        size_bytes = arguments.file.stat().st_size
        if size_bytes > MAX_ARTIFACT_BYTES:
            raise ConfigurationError(f"{arguments.file} has {size_bytes} bytes, a calibration {MAX_ARTIFACT_BYTES}")
        artifact = arguments.file.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"can't read {arguments.file}: {error.strerror}") from error
    with _bar("put") as progress:
        digest = peer.put_calibration(arguments.model_digest, artifact, progress)
    print(digest.hex())


def _remove(arguments: argparse.Namespace, peer: PeerTransport) -> None:
    if not peer.delete_calibration(arguments.model_digest, arguments.digest):
        raise NotFoundError(
            f"{arguments.remote} has no calibration {arguments.digest.hex()} for model {arguments.model_digest.hex()}"
        )


def _as_json(entry: CalibrationEntry) -> dict[str, object]:
    return {
        "model_digest": entry.model_digest.hex(),
        "digest": entry.digest.hex(),
        "bytes": entry.size_bytes,
        "stored_at": _stored_at(entry),
        "current": entry.is_current,
    }


def _stored_at(entry: CalibrationEntry) -> str:
    return datetime.datetime.fromtimestamp(entry.stored_at_ms // 1000, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextlib.contextmanager
def _bar(words: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, for what is large enough to wait for; a function that moves it."""
    with contextlib.ExitStack() as stack:
        bar: tqdm | None = None

        def progress(moved_bytes: int, size_bytes: int) -> None:
            nonlocal bar
            if bar is None:
                if size_bytes < _BAR_FROM_BYTES:
                    return
                # None: no bar where stderr is not a terminal.
                bar = tqdm(total=size_bytes, desc=words, unit="B", unit_scale=True, disable=None)
                stack.callback(bar.close)
            bar.update(moved_bytes - bar.n)

        yield progress
