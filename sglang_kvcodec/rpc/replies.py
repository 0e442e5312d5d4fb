"""Checks of what a peer answers: a client trusts it no more than a peer trusts a client."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_kvcodec.config import MAX_OBJECT_BYTES
from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.exchange import (
    FetchedFragment,
    FetchedHeader,
    FetchEvent,
    LookupResult,
    PutResult,
)
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.putting import OUTCOMES_BACK

_STORED = b"\1"


def lookup_result(response: pb.LookupResponse, pages: int) -> LookupResult:
    """The answer to a Lookup of ``pages`` pages.

    Raises:
        FormatError: it contradicts the question or itself.
    """
    covered = response.covered_pages
    said: bytes = response.present
    # The first byte that says something else than "stored" ends the prefix.
    if len(said) != pages or covered != pages - len(said.lstrip(_STORED)):
        raise FormatError(f"{covered} pages covered, {len(said)} answered of {pages} asked")
    return LookupResult(covered, tuple(map(_STORED[0].__eq__, said)), response.covered_bytes)


def put_results(response: pb.PutResponse, objects: int) -> list[PutResult]:
    """The answer to a Put of ``objects`` objects.

    Raises:
        FormatError: another number of results, or an outcome this version does not know.
    """
    if len(response.results) != objects:
        raise FormatError(f"{len(response.results)} results for {objects} objects")
    try:
        return [PutResult(OUTCOMES_BACK[result.outcome], result.detail) for result in response.results]
    except KeyError as error:
        raise FormatError(f"unknown outcome {error}") from None


class FetchChecks:
    """Indexes and sizes of one Fetch. Gaps, overlaps and contents are for the reader of the pages."""

    def __init__(self, page_hashes: Sequence[bytes]) -> None:
        self._pages = len(page_hashes)
        self._payload: dict[int, tuple[int, int]] = {}

    def check(self, event: FetchEvent) -> None:
        """Refuses an event that no request like this one can have.

        Raises:
            FormatError: with what is wrong.
        """
        index = event.page_index
        if index >= self._pages:
            raise FormatError(f"page {index} of {self._pages}")
        if isinstance(event, FetchedHeader):
            if index in self._payload or not 0 < len(event.header) <= event.object_bytes <= MAX_OBJECT_BYTES:
                raise FormatError(f"page {index}: a header of {len(event.header)} of {event.object_bytes} bytes")
            self._payload[index] = (len(event.header), event.object_bytes)
        elif isinstance(event, FetchedFragment):
            start, stop = self._payload.get(index, (0, 0))
            if not event.data or not start <= event.offset <= stop - len(event.data):
                raise FormatError(f"page {index}: {len(event.data)} bytes at {event.offset}, outside its payload")
