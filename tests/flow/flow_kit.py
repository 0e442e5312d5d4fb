"""What the flow's tests share: small specs, a storage engine with hooks, a transport that is watched, metrics."""

import dataclasses
import threading

import pytest
from prometheus_client import REGISTRY

from sglang_kvcodec.config import Timeouts
from sglang_kvcodec.flow.link_meter import LinkMeter
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.prefill_meter import PrefillMeter
from sglang_kvcodec.flow.rates import Rates
from sglang_kvcodec.flow.restore_meter import RestoreMeter
from sglang_kvcodec.format.spec import KVDtype, KVSpec
from sglang_kvcodec.storage.memory import MemoryEngine

NAMESPACE = bytes(range(32))
SMALL = KVSpec(layers=7, kv_heads=3, head_dim=20, page_tokens=16, dtype=KVDtype.BFLOAT16)
"""One layer group of seven layers; a raw page takes some 27 kB."""
GROUPED = KVSpec(layers=7, kv_heads=3, head_dim=128, page_tokens=43, dtype=KVDtype.BFLOAT16)
"""Three layer groups: three, three and one layer."""
LIMIT_S = 30
TIMEOUTS = Timeouts(connect_s=20, lookup_s=20, progress_s=20, fetch_s=60, put_s=60, retry_s=0.05)


def counted(name, **labels):
    """A metric now; 0 before its first event."""
    return REGISTRY.get_sample_value(name, labels) or 0.0


def new_rates():
    """Rates of which nothing is known."""
    return Rates(LinkMeter(), RestoreMeter(1, 2, 32, 2), PrefillMeter())


def wait_until(condition):
    """Waits for what other threads do."""
    pause = threading.Event()
    for _ in range(int(LIMIT_S / 0.01)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it did not come to pass")


class Delta:
    """How much metrics have grown since it was made."""

    def __init__(self):
        self._before = self._all()

    @staticmethod
    def _all():
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
        }

    def __call__(self, name, **labels):
        return counted(name, **labels) - self._before.get((name, tuple(sorted(labels.items()))), 0.0)


class HookedEngine(MemoryEngine):
    """Calls ``before(method, key)`` and ``after(method, key)`` around each call; the first may raise or wait."""

    reads_wait = True

    def __init__(self, capacity_bytes=1 << 30):
        super().__init__(capacity_bytes)
        self.before = self.after = lambda method, key: None

    def _hooked(self, method, key, *args):
        self.before(method, key)
        result = getattr(super(), method)(*args)
        self.after(method, key)
        return result

    def sizes(self, keys):
        return self._hooked("sizes", b"".join(keys), keys)

    def get_range(self, key, start, stop):
        return self._hooked("get_range", key, key, start, stop)

    def put(self, key, value):
        return self._hooked("put", key, key, value)

    def delete(self, key):
        return self._hooked("delete", key, key)


class WatchedPeer:
    """A transport that passes on, counts its calls, and calls ``on_event(event)`` for each event of a fetch."""

    def __init__(self, inner):
        self.inner = inner
        self.calls = []
        self.on_event = lambda event: None
        self.before = lambda name: None

    def fetch(self, namespace_digest, page_hashes, cancelled=None):
        self.calls.append("fetch")
        self.before("fetch")
        for event in self.inner.fetch(namespace_digest, page_hashes, cancelled):
            yield event
            self.on_event(event)

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append(name)
            self.before(name)
            return getattr(self.inner, name)(*args, **kwargs)

        return call


@dataclasses.dataclass
class Connection:
    """A client of a peer, with its monitor."""

    peer: WatchedPeer
    monitor: PeerMonitor


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def about(value, share=0.05):
    return pytest.approx(value, rel=share)
