"""The peers that an operator's command is about, and walks over their pages in steps of bounded size."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from sglang_kvcodec.config import Access, Timeouts, parse_remotes
from sglang_kvcodec.errors import ForeignPageError
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.rpc.admin_client import PeerAdmin, StoredPage
from sglang_kvcodec.rpc.client import GrpcPeer

TIMEOUTS = Timeouts(connect_s=5.0, lookup_s=60.0, progress_s=60.0, put_s=600.0)
"""Longer than a server's: somebody watches, and can end it."""
_PAGES_PER_STEP = 256
_BYTES_PER_STEP = 64 << 20


@dataclasses.dataclass(frozen=True)
class AdminPeer:
    """One peer: where it is, its pages' service and its operator's."""

    url: str
    peer: GrpcPeer
    admin: PeerAdmin


@contextlib.contextmanager
def connected(remote: str, access: Access) -> Iterator[list[AdminPeer]]:
    """The peers that ``grpc://HOST:PORT[,HOST:PORT...]`` names, each for itself; closed at the end of the block.

    Args:
        remote: the URL; ``grpcs`` by TLS.
        access: certificates and token, the same for all of them.

    Raises:
        ConfigurationError: not such a URL, or files of ``access`` that are not what they should be.
    """
    with contextlib.ExitStack() as stack:
        peers = []
        scheme = remote.partition("://")[0]
        for address in parse_remotes(remote):
            url = f"{scheme}://{address}"
            peer = stack.enter_context(contextlib.closing(GrpcPeer(url, TIMEOUTS, access=access)))
            peers.append(AdminPeer(url, peer, stack.enter_context(contextlib.closing(PeerAdmin(peer)))))
        yield peers


def steps(pages: Iterable[StoredPage]) -> Iterator[list[StoredPage]]:
    """Pages in groups of one namespace that are small enough for one call."""
    step: list[StoredPage] = []
    step_bytes = 0
    for page in pages:
        is_other = bool(step) and step[0].key.namespace_digest != page.key.namespace_digest
        if is_other or len(step) == _PAGES_PER_STEP or step_bytes + page.object_bytes > _BYTES_PER_STEP:
            if step:
                yield step
            step, step_bytes = [], 0
        step.append(page)
        step_bytes += page.object_bytes
    if step:
        yield step


def hashes_of(step: Sequence[StoredPage]) -> list[bytes]:
    """The page hashes of a step."""
    return [page.key.page_hash for page in step]


def is_a_tenants(key: PageKey, data: bytes) -> bool:
    """Checks every byte of a stored object; whether it lies under another namespace than its own.

    Who is of no tenant sees the pages of tenants so. Which tenant's it is can't be told, nor that its key is the right
    one: the page hash can.

    Raises:
        FormatError: it is damaged, or another page's.
    """
    stored = PageObject(data).header.key
    if stored.page_hash != key.page_hash:
        raise ForeignPageError(f"page {stored} is stored under another key")
    return stored.namespace_digest != key.namespace_digest


def byte_bar(words: str, total_bytes: int | None) -> Any:
    """A bar of bytes on stderr, none where that is no terminal. 0 is what a peer says that does not tell."""
    return tqdm(total=total_bytes or None, desc=words, unit="B", unit_scale=True, disable=None)


def utc(at_ms: int) -> str:
    """Milliseconds of Unix time as a date."""
    return datetime.datetime.fromtimestamp(at_ms // 1000, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
