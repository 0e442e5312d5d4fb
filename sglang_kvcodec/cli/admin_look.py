"""``kvcodec admin stat``, ``ls``, ``verify`` and ``warm``: what changes nothing."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
from collections.abc import Sequence

from tqdm import tqdm

from sglang_kvcodec.cli.admin_peers import AdminPeer, byte_bar, hashes_of, is_a_tenants, steps, utc
from sglang_kvcodec.errors import FormatError, UnknownFormatError
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import MAGIC
from sglang_kvcodec.rpc.admin_client import NamespaceUse, StoredPage

_KEEPS_WHAT_IT_READS = {
    "memory": "the pages are in this peer's memory already",
    "lmdb": "they are in the page cache of the peer's machine, as far as its memory goes",
}
_KEEPS_NOTHING = "the peer keeps nothing of them: it warmed the caches of its {engine} store, if that has any"


def stat(arguments: argparse.Namespace, peers: Sequence[AdminPeer]) -> int:
    """Prints each peer's account of itself, and with ``--by-namespace`` what each namespace takes."""
    for peer in peers:
        account = peer.peer.stat()
        uses = peer.admin.namespaces() if arguments.by_namespace else None
        if arguments.json:
            line = {"peer": peer.url, **dataclasses.asdict(account)}
            if uses is not None:
                line["namespaces"] = [_as_json(use) for use in uses]
            print(json.dumps(line))
            continue
        share = account.stored_bytes / account.capacity_bytes if account.capacity_bytes else 0.0
        print(f"{peer.url}: kvcodec {account.software_version}, format {account.format_version}, {account.engine}")
        print(f"  objects   {account.objects}")
        print(f"  bytes     {account.stored_bytes} of {account.capacity_bytes} ({share:.1%})")
        print(f"  evicted   {account.evicted_objects} objects")
        if uses is not None:
            _print_uses(uses)
    return 0


def ls(arguments: argparse.Namespace, peers: Sequence[AdminPeer]) -> int:
    """Prints the namespaces of each peer, or the pages of one, as they arrive."""
    for peer in peers:
        if len(peers) > 1 and not arguments.json:
            print(f"{peer.url}:")
        if arguments.namespace is None:
            uses = peer.admin.namespaces()
            if arguments.json:
                for use in uses:
                    print(json.dumps({"peer": peer.url, **_as_json(use)}))
            else:
                _print_uses(uses)
            continue
        if not arguments.json:
            print(f"{'PAGE':64}  {'BYTES':>10}  STORED")
        for page in peer.admin.pages(arguments.namespace):
            _print_page(peer.url, page, arguments.json)
    return 0


def verify(arguments: argparse.Namespace, peers: Sequence[AdminPeer]) -> int:
    """Reads every object and checks it as a server does; 1 if one is damaged."""
    damaged = 0
    for peer in peers:
        found: collections.Counter[str] = collections.Counter()
        with byte_bar("verify", _total_bytes(arguments, peer)) as bar:
            for step in steps(peer.admin.pages(arguments.namespace or b"")):
                objects = peer.admin.read(step[0].key.namespace_digest, hashes_of(step))
                for page, data in zip(step, objects, strict=True):
                    found[_verdict(page.key, data)] += 1
                    bar.update(page.object_bytes)
        words = f"{found['sound']} sound, {found['damaged']} damaged, {found['gone']} gone meanwhile"
        others = f", {found['unknown']} of a format that this version can't read" if found["unknown"] else ""
        tenants = f", {found['tenants']} sound ones of tenants" if found["tenants"] else ""
        print(f"{peer.url}: {words}{tenants}{others}")
        damaged += found["damaged"]
    return 1 if damaged else 0


def _verdict(key: PageKey, data: bytes | None) -> str:
    """What an object is: ``sound``, of ``tenants`` and sound, ``damaged``, ``gone``, or of an ``unknown`` format."""
    if data is None:
        return "gone"
    try:
        return "tenants" if is_a_tenants(key, data) else "sound"
    except FormatError as error:
        if isinstance(error, UnknownFormatError) and data.startswith(MAGIC):
            return "unknown"
        with tqdm.external_write_mode():
            print(f"{key.namespace_digest.hex()} {key.page_hash.hex()} is damaged: {error}")
        return "damaged"


def warm(arguments: argparse.Namespace, peers: Sequence[AdminPeer]) -> int:
    """Has each peer read its pages, which are not sent."""
    for peer in peers:
        engine = peer.peer.stat().engine
        pages = read_bytes = 0
        with byte_bar("warm", _total_bytes(arguments, peer)) as bar:
            for step in steps(peer.admin.pages(arguments.namespace or b"")):
                for size_bytes in peer.admin.warm(step[0].key.namespace_digest, hashes_of(step)):
                    if size_bytes is not None:
                        pages += 1
                        read_bytes += size_bytes
                        bar.update(size_bytes)
        what = _KEEPS_WHAT_IT_READS.get(engine, _KEEPS_NOTHING.format(engine=engine))
        print(f"{peer.url}: read {pages} pages, {read_bytes} bytes; {what}")
    return 0


def _total_bytes(arguments: argparse.Namespace, peer: AdminPeer) -> int | None:
    """What is ahead, if that is cheap to know: of one namespace it is not."""
    return None if arguments.namespace else peer.peer.stat().stored_bytes


def _as_json(use: NamespaceUse) -> dict[str, object]:
    return {"namespace": use.namespace_digest.hex(), "objects": use.objects, "bytes": use.stored_bytes}


def _print_uses(uses: Sequence[NamespaceUse]) -> None:
    print(f"{'NAMESPACE':64}  {'PAGES':>10}  {'BYTES':>14}")
    for use in uses:
        print(f"{use.namespace_digest.hex()}  {use.objects:>10}  {use.stored_bytes:>14}")


def _print_page(url: str, page: StoredPage, as_json: bool) -> None:
    if not as_json:
        print(f"{page.key.page_hash.hex()}  {page.object_bytes:>10}  {utc(page.stored_at_ms)}")
        return
    line = {
        "peer": url,
        "namespace": page.key.namespace_digest.hex(),
        "page": page.key.page_hash.hex(),
        "bytes": page.object_bytes,
        "stored_at": utc(page.stored_at_ms),
    }
    print(json.dumps(line))
