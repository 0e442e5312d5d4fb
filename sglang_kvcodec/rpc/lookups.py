"""What a Lookup answers."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_kvcodec.rpc import peer_pb2 as pb

_PRESENT, _ABSENT = b"\1", b"\0"


def found_pages(sizes: Sequence[int | None]) -> pb.LookupResponse:
    """The answer for pages of these sizes in bytes, in the order of the request; None for one that is not stored.

    It covers the pages before the first that is missing, whatever is stored behind that.
    """
    if None not in sizes:
        # Most often, and without a step for each of a thousand pages.
        return pb.LookupResponse(
            covered_pages=len(sizes), present=_PRESENT * len(sizes), covered_bytes=sum(size or 0 for size in sizes)
        )
    covered = sizes.index(None)
    return pb.LookupResponse(
        covered_pages=covered,
        present=b"".join([_ABSENT if size is None else _PRESENT for size in sizes]),
        covered_bytes=sum(size or 0 for size in sizes[:covered]),
    )
