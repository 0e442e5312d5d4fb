"""Pages of awkward sizes, an engine with faults, and a peer in this process."""

import asyncio
import contextlib
import random
import threading

import pytest

from sglang_kvcodec.config import Timeouts
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import SideData, build_page_object
from sglang_kvcodec.format.spec import KVDtype, KVSpec, layer_groups
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.rpc.server import PeerServer
from sglang_kvcodec.storage.memory import MemoryEngine

NAMESPACE = bytes(range(32))
SPEC = KVSpec(layers=7, kv_heads=1, head_dim=1024, page_tokens=64, dtype=KVDtype.BFLOAT16)
"""Three layer groups; how large the parts are is up to each page."""
PATIENT = Timeouts(connect_s=20, lookup_s=20, progress_s=20, fetch_s=60, put_s=60)


def make_page(name, part_bytes=(1, 5003, 17, 100_001, 3, 70_000)):
    """Hash and object of a page whose parts have these sizes, side by side, group by group."""
    source = random.Random(repr(name))
    page_hash = source.randbytes(32)
    sizes = iter(part_bytes)
    groups = [{side: SideData(stored=source.randbytes(next(sizes))) for side in SPEC.sides} for _ in layer_groups(SPEC)]
    return page_hash, build_page_object(PageKey(NAMESPACE, page_hash), SPEC, "raw", groups)


class FaultyEngine(MemoryEngine):
    """Calls ``before(method, key)`` first, which may raise or wait."""

    reads_wait = True

    def __init__(self, capacity_bytes=1 << 30):
        super().__init__(capacity_bytes)
        self.before = lambda method, key: None

    def sizes(self, keys):
        self.before("sizes", b"".join(keys))
        return super().sizes(keys)

    def get_range(self, key, start, stop):
        self.before("get_range", key)
        return super().get_range(key, start, stop)

    def put(self, key, value):
        self.before("put", key)
        return super().put(key, value)

    def delete(self, key):
        self.before("delete", key)
        return super().delete(key)

    def stat(self):
        self.before("stat", b"")
        return super().stat()


class PeerThread:
    """A peer server in a thread of this process."""

    def __init__(self, engine, limits=None, artifacts=None, security=None):
        self._ready = threading.Event()
        self._failure = None
        self._is_stopping = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(engine, limits, artifacts, security)))
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        self.remote = f"grpc://{self.address}"

    async def _main(self, engine, limits, artifacts, security):
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        try:
            self.server = PeerServer(engine, "127.0.0.1:0", limits, artifacts, security)
            await self.server.start()
            self.address = self.server.address
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._ready.set()
        await self._stopping.wait()
        await self.server.stop(self._grace_s)

    def begin_stop(self, grace_s):
        if self._is_stopping:
            return
        self._is_stopping = True
        self._grace_s = grace_s
        self._loop.call_soon_threadsafe(self._stopping.set)

    def stop(self, grace_s=0):
        self.begin_stop(grace_s)
        self._thread.join()


@pytest.fixture
def engine():
    return FaultyEngine()


@pytest.fixture
def start_peer(engine):
    """Starts peers and stops them after the test; ``start_peer(limits, artifacts, security)`` gives a running one."""
    with contextlib.ExitStack() as stack:

        def start(limits=None, artifacts=None, security=None):
            peer = PeerThread(engine, limits, artifacts, security)
            stack.callback(peer.stop)
            return peer

        yield start


@pytest.fixture
def connect():
    """Makes clients and closes them after the test."""
    with contextlib.ExitStack() as stack:

        def make(remote, timeouts=PATIENT, **kwargs):
            client = GrpcPeer(remote, timeouts, **kwargs)
            stack.callback(client.close)
            return client

        yield make


@pytest.fixture
def peer(start_peer, connect):
    """A client of a running peer."""
    return connect(start_peer().remote)


@pytest.fixture
def namespace():
    return NAMESPACE


@pytest.fixture
def page():
    """Makes pages: ``page(name, part_bytes)``."""
    return make_page
