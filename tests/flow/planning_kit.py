"""A prefix and what is known of link, decoders and prefill, for tests of what is planned; and what the parts take."""

import math

from sglang_kvcodec.flow.planner import Bounds
from sglang_kvcodec.flow.prediction import Knowledge, Prefix
from sglang_kvcodec.flow.prefill_meter import PrefillModel
from sglang_kvcodec.flow.restore_meter import RestoreModel

PLENTY = Bounds(1, 1 << 60)
PREFILL = PrefillModel(0.005, 1e-4, 1e-9)
RESTORE = RestoreModel(1e-4, 1e-9, 10, 32, 2, 5)


def prefix(pages, page_bytes=100_000, before=0, rest=17):
    return Prefix([page_bytes] * pages, 64, before, before + pages * 64 + rest)


def known(bytes_per_s=1e9, round_trip_s=0.001, others=(), restore=RESTORE, prefill=PREFILL):
    return Knowledge(round_trip_s, bytes_per_s, others, restore, prefill)


def link_s(known, size_bytes):
    """So many bytes take so long beside what others receive, round trips apart."""
    return (size_bytes + sum(min(size_bytes, other) for other in known.others_bytes)) / known.bytes_per_s


def restore_s(restore, pages, size_bytes):
    """So many pages take so long to restore, by threads that have nothing else to do."""
    parts = math.ceil(pages / restore.segment_pages) * restore.parts
    return (parts * restore.part_s + size_bytes * restore.byte_s) / restore.threads
