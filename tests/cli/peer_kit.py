"""Pages for real ``kvcodec serve`` processes, and what they have of them."""

import random
import urllib.request

from sglang_kvcodec.config import Timeouts
from sglang_kvcodec.format.exchange import FetchedHeader
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import SideData, build_page_object
from sglang_kvcodec.format.spec import KVDtype, KVSpec, layer_groups

NAMESPACE = bytes(range(32))
SPEC = KVSpec(layers=7, kv_heads=1, head_dim=1024, page_tokens=64, dtype=KVDtype.BFLOAT16)
PATIENT = Timeouts(connect_s=20, lookup_s=20, progress_s=20, fetch_s=60, put_s=60)


def make_page(name, part_bytes=50_001):
    """Hash and object of a page of six parts."""
    source = random.Random(name)
    page_hash = source.randbytes(32)
    groups = [{side: SideData(stored=source.randbytes(part_bytes)) for side in SPEC.sides} for _ in layer_groups(SPEC)]
    return page_hash, build_page_object(PageKey(NAMESPACE, page_hash), SPEC, "raw", groups)


PAGES = [make_page(f"page {index}") for index in range(4)]
HASHES = [page_hash for page_hash, _ in PAGES]


def fetch_all(client, hashes=tuple(HASHES)):
    """The objects of stored pages, in order."""
    pages = {}
    for event in client.fetch(NAMESPACE, hashes):
        if isinstance(event, FetchedHeader):
            pages[event.page_index] = bytearray(event.header) + bytearray(event.object_bytes - len(event.header))
        else:
            pages[event.page_index][event.offset : event.offset + len(event.data)] = event.data
    return [bytes(pages[index]) for index in range(len(hashes))]


def metrics_of(process):
    """The metrics of a peer started with ``--metrics-port 0``, as text."""
    address = process.ready_line.rpartition("metrics=")[2]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as response:
        return response.read().decode()
