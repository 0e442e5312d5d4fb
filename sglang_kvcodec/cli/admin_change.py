"""``kvcodec admin rm``, ``export`` and ``import``: what deletes pages, and takes them from one store to another."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from sglang_kvcodec.cli.admin_peers import TIMEOUTS, AdminPeer, byte_bar, hashes_of, is_a_tenants, steps
from sglang_kvcodec.cli.peer_access import access
from sglang_kvcodec.errors import ChecksumError, ConfigurationError, FormatError, KVCodecError
from sglang_kvcodec.format.exchange import PeerTransport, PutOutcome
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_archive import ArchivedPage, ArchiveWriter, read_archive
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.rpc.connect import connect

_PAGES_PER_PUT = 64
_BYTES_PER_PUT = 16 << 20


def rm(arguments: argparse.Namespace, peers: Sequence[AdminPeer]) -> int:
    """Deletes pages of a namespace, or all of it, once that is confirmed; 1 if it is not."""
    namespace = arguments.namespace
    if not arguments.yes and not _is_confirmed(arguments, peers):
        print("nothing was deleted")
        return 1
    for peer in peers:
        deleted = 0
        if arguments.pages:
            deleted = peer.peer.delete(namespace, arguments.pages)
        else:
            with tqdm(desc="rm", unit=" pages", disable=None) as bar:
                for step in steps(peer.admin.pages(namespace)):
                    deleted += peer.peer.delete(namespace, hashes_of(step))
                    bar.update(len(step))
        print(f"{peer.url}: deleted {deleted} pages")
    return 0


def _is_confirmed(arguments: argparse.Namespace, peers: Sequence[AdminPeer]) -> bool:
    if not sys.stdin.isatty():
        raise ConfigurationError("rm asks before it deletes, and there is nobody to ask: add --yes")
    what = f"{len(arguments.pages)} pages" if arguments.pages else "all pages"
    print(f"delete {what} of namespace {arguments.namespace.hex()} from {', '.join(peer.url for peer in peers)}?")
    return input("[y/N] ").strip().lower() in ("y", "yes")


def export(arguments: argparse.Namespace, peers: Sequence[AdminPeer]) -> int:
    """Writes the pages of all peers, each once, to a file; 1 if some were left out: damaged ones, those of tenants.

    A tenant's page is none of the default tenant's, which it would be after an import: its tenant's token exports it.
    """
    if arguments.file.exists() and not arguments.force:
        raise ConfigurationError(f"{arguments.file} exists; --force overwrites it")
    # Several peers keep pages more than once. Half a digest tells them apart, and takes half the memory.
    seen: set[bytes] | None = set() if len(peers) > 1 else None
    with _replaced(arguments.file) as file:
        writer = ArchiveWriter(file)
        left_out = [_export_from(peer, arguments.namespace, writer, seen) for peer in peers]
        writer.finish()
    print(f"exported {writer.objects} pages, {writer.object_bytes} bytes")
    if tenants := sum(each.tenants for each in left_out):
        print(f"left out {tenants} pages of tenants: export those with a token of their tenant", file=sys.stderr)
    return 1 if tenants or any(each.damaged for each in left_out) else 0


class _LeftOut(NamedTuple):
    """Pages that were not exported."""

    damaged: int
    tenants: int


def _export_from(peer: AdminPeer, namespace: bytes | None, writer: ArchiveWriter, seen: set[bytes] | None) -> _LeftOut:
    """Writes the pages of a peer that are not among those ``seen``, and adds them to these."""
    damaged = tenants = 0
    with byte_bar("export", None if namespace else peer.peer.stat().stored_bytes) as bar:
        for step in steps(peer.admin.pages(namespace or b"")):
            bar.update(sum(page.object_bytes for page in step))
            new = [page for page in step if seen is None or _short_name(page.key) not in seen]
            objects = peer.admin.read(step[0].key.namespace_digest, hashes_of(new))
            for page, data in zip(new, objects, strict=True):
                if data is None:
                    continue
                try:
                    if is_a_tenants(page.key, data):
                        tenants += 1
                        continue
                except FormatError as error:
                    damaged += 1
                    _say_left_out(page.key, error)
                    continue
                writer.add(page.key, data)
                if seen is not None:
                    seen.add(_short_name(page.key))
    return _LeftOut(damaged, tenants)


def import_(arguments: argparse.Namespace, peers: Sequence[AdminPeer]) -> int:
    """Checks each object of a file and puts those that are not there; 1 if one could not be stored."""
    outcomes = dict.fromkeys(PutOutcome, 0)
    try:
        file_bytes = arguments.file.stat().st_size
        file = arguments.file.open("rb")
    except OSError as error:
        raise ConfigurationError(f"can't read {arguments.file}: {error.strerror}") from error
    transport = connect(arguments.remote, TIMEOUTS, arguments.replicas, access(arguments))
    copies = min(arguments.replicas, len(peers))
    with file, contextlib.closing(transport), byte_bar("import", file_bytes) as bar:
        try:
            for group in _groups(read_archive(file)):
                for outcome in _import_group(group, peers, transport, copies):
                    outcomes[outcome] += 1
                bar.update(file.tell() - bar.n)
        finally:
            # Also of a file that turns out to be cut: what was whole is stored, and the rest can follow.
            words = (
                f"stored {outcomes[PutOutcome.STORED]} pages, {outcomes[PutOutcome.ALREADY_STORED]} were there",
                f"{outcomes[PutOutcome.REJECTED]} damaged, {outcomes[PutOutcome.NO_CAPACITY]} found no room",
            )
            with tqdm.external_write_mode():
                print(", ".join(words))
    return 1 if outcomes[PutOutcome.REJECTED] or outcomes[PutOutcome.NO_CAPACITY] else 0


def _groups(pages: Iterator[ArchivedPage]) -> Iterator[list[ArchivedPage]]:
    """Pages in groups of one namespace that are small enough for one Put; the last one also if ``pages`` fails."""
    group: list[ArchivedPage] = []
    group_bytes = 0
    failure: FormatError | None = None
    while True:
        try:
            page = next(pages, None)
        except FormatError as error:
            failure, page = error, None
        is_full = page is None or len(group) == _PAGES_PER_PUT or group_bytes + len(page.data) > _BYTES_PER_PUT
        if group and (is_full or (page and page.key.namespace_digest != group[0].key.namespace_digest)):
            yield group
            group, group_bytes = [], 0
        if page is None:
            break
        group.append(page)
        group_bytes += len(page.data)
    if failure is not None:
        raise failure


def _import_group(
    group: Sequence[ArchivedPage], peers: Sequence[AdminPeer], transport: PeerTransport, copies: int
) -> Iterator[PutOutcome]:
    namespace = group[0].key.namespace_digest
    sound = []
    for page in group:
        try:
            if page.is_damaged:
                raise ChecksumError("its bytes are not those that were exported")
            PageObject(page.data, expected=page.key)
        except FormatError as error:
            _say_left_out(page.key, error)
            yield PutOutcome.REJECTED
            continue
        sound.append((page.key.page_hash, page.data))
    if not sound:
        return
    hashes = [page_hash for page_hash, _ in sound]
    sizes_by_peer = [peer.admin.object_bytes(namespace, hashes) for peer in peers]
    stored_copies = [sum(size is not None for size in sizes) for sizes in zip(*sizes_by_peer, strict=True)]
    missing = [page for page, found in zip(sound, stored_copies, strict=True) if found < copies]
    yield from [PutOutcome.ALREADY_STORED] * (len(sound) - len(missing))
    if not missing:
        return
    for (page_hash, _), result in zip(missing, transport.put(namespace, missing), strict=True):
        if result.detail:
            with tqdm.external_write_mode():
                print(f"{page_hash.hex()} was not stored: {result.detail}", file=sys.stderr)
        yield result.outcome


@contextlib.contextmanager
def _replaced(path: pathlib.Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends without an error.

    Raises:
        ConfigurationError: it can't be written.
    """
    unfinished = path.with_name(path.name + ".part")
    try:
        try:
            with unfinished.open("wb") as file:
                yield file
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        if isinstance(error, KVCodecError):  # a peer's failure is an OSError as well
            raise
        raise ConfigurationError(f"can't write {path}: {error.strerror}") from error


def _say_left_out(key: PageKey, error: FormatError) -> None:
    with tqdm.external_write_mode():
        print(f"left out {key.page_hash.hex()}: {error}", file=sys.stderr)


def _short_name(key: PageKey) -> bytes:
    return hashlib.blake2b(key.to_bytes(), digest_size=16).digest()
