import dataclasses
import logging
import time
import types

import pytest
import torch
from prometheus_client import REGISTRY

from sglang_kvcodec.config import ServerConfig
from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.flow.page_packer import DEVICE_CANVASES_BYTES, pack_buffer_bytes
from sglang_kvcodec.flow.prefill_meter import PrefillModel
from sglang_kvcodec.flow.restore_buffers import restore_buffer_bytes
from sglang_kvcodec.flow.restore_meter import RESTORE_DOUBTED_S, RestoreModel
from sglang_kvcodec.flow.restorer import SEGMENT_PAGES
from sglang_kvcodec.flow.stored_prefix import Tier
from sglang_kvcodec.format.namespace import Namespace, PageKey
from sglang_kvcodec.format.profile import Coding, get_profile
from sglang_kvcodec.format.spec import KVDtype, KVSpec
from sglang_kvcodec.plugin import runtime as runtime_module
from sglang_kvcodec.plugin.runtime import Runtime
from sglang_kvcodec.testing.calibrations import random_calibration
from sglang_kvcodec.transform import PageTransforms

SPEC = KVSpec(layers=4, kv_heads=1, head_dim=64, page_tokens=16, dtype=KVDtype.BFLOAT16)
CALIBRATION = random_calibration(SPEC)


def counted(name, **labels):
    return REGISTRY.get_sample_value(name, labels)


def namespace(weights="w"):
    """As ``build_namespace`` makes it, of an uncalibrated server."""
    high = get_profile("high")
    return Namespace(weights, "c", "", SPEC, 0, 0, 1, 0, 1, "sglang-0.5.23", "", high.name, high.stages)


CODED_NAMESPACE = dataclasses.replace(
    namespace(),
    profile="compact",
    stages=get_profile("compact", calibrated=True).stages,
    calibration_digest=CALIBRATION.digest.hex(),
)


class FakeAuto:
    """Stands for what makes a calibration."""

    def __init__(self, peer, on_calibration):
        self.on_calibration = on_calibration
        self.calls = []
        self.offer = lambda values, first_position: None
        self.wants_pages = lambda: True
        self.stop = lambda: self.calls.append("stop")
        self.close = lambda: self.calls.append("close")


@pytest.fixture
def start():
    """A runtime without a peer."""
    started = []

    def make(calibration=None, weights=lambda: "w", auto=False, profile="compact"):
        config = ServerConfig("grpc://127.0.0.1:1", profile=profile, auto_calibrate=auto)
        transforms = PageTransforms(SPEC, config.tiers, [calibration] if calibration else [])
        autos = []

        def new_auto(peer, on_calibration):
            autos.append(FakeAuto(peer, on_calibration))
            return autos[0]

        pool = PagedKVPool(SPEC, dict, torch.device("cpu"))
        runtime = Runtime(
            config, pool, transforms, calibration, lambda: namespace(weights()), new_auto if auto else None
        )
        started.append(runtime)
        return types.SimpleNamespace(runtime=runtime, transforms=transforms, auto=autos[0] if autos else None)

    yield make
    for runtime in started:
        runtime.close()


def test_without_a_calibration_pages_are_in_the_namespace_of_the_uncalibrated_profile(start):
    runtime = start().runtime
    assert runtime.tiers() == [Tier("high", (namespace().digest,))]


def test_with_a_calibration_its_digest_tier_and_stages_are_in_the_namespace(start):
    runtime = start(CALIBRATION).runtime
    assert runtime.tiers() == [Tier("compact", (CODED_NAMESPACE.digest,))]


def test_a_calibration_made_later_codes_what_comes_and_the_old_pages_stay_readable(start):
    server = start(auto=True)
    ((before,),) = [tier.namespace_digests for tier in server.runtime.tiers()]
    server.transforms.add(CALIBRATION)
    server.auto.on_calibration(CALIBRATION)
    assert server.runtime.tiers() == [Tier("compact", (CODED_NAMESPACE.digest, before))]


def test_a_server_that_would_make_one_reads_what_was_published_without_it(start):
    server = start(CALIBRATION, auto=True)
    assert server.runtime.tiers() == [Tier("compact", (CODED_NAMESPACE.digest, namespace().digest))]


def test_new_weights_are_a_new_namespace_and_no_calibration_is_made_of_their_mixture(start):
    weights = ["old"]
    server = start(auto=True, weights=lambda: weights[0])
    runtime = server.runtime
    before = runtime.tiers()
    weights[0] = "new"
    runtime.weights_changing()
    assert server.auto.calls == ["stop"]
    assert runtime.tiers() == []
    runtime.flushed()
    assert runtime.tiers() == [Tier("high", (namespace("new").digest,))] != before


def test_pages_on_their_way_are_coded_as_their_namespace_says(start):
    server = start(auto=True)
    (old,) = server.runtime.tiers()[0].namespace_digests
    server.transforms.add(CALIBRATION)
    server.auto.on_calibration(CALIBRATION)
    new = server.runtime.tiers()[0].namespace_digests[0]
    coded_with = server.runtime._coding_of
    assert (coded_with[old], coded_with[new]) == (Coding("high"), Coding("compact", CALIBRATION.digest))


def test_what_is_counted_by_tier_is_shown_before_the_first_event(start):
    start()
    for name in ("fetched_bytes", "restored_tokens", "restored_bytes", "published_bytes", "published_kv_bytes"):
        assert counted(f"kvcodec_{name}_total", tier="high") is not None


def test_while_nothing_is_known_of_a_restore_it_is_the_pages_that_wait_if_others_are_there(start):
    runtime = start().runtime
    pages = [bytes(10_000)] * 4
    assert runtime.holds_up(pages, 64, 600, True)
    assert not runtime.holds_up(pages, 64, 600, False)
    runtime.rates.prefill.model = lambda refit: PrefillModel(0, 1e-4, 0)
    runtime.rates.restore.model = lambda refit, profile_name: RestoreModel(0, 1e-6, 10, 32, 1, 4)
    assert not runtime.holds_up(pages, 64, 64 + 1000, True)
    assert runtime.holds_up(pages, 64, 64 + 300, True)


@dataclasses.dataclass
class UnheardOfPage:
    """One of which nothing has arrived: all that is known is its key and its size."""

    key: PageKey

    def __len__(self):
        return 10_000


def test_pages_in_host_memory_are_restored_if_that_pays_for_their_tier_or_has_to_be_found_out(start):
    runtime = start(profile="raw,exact").runtime
    pages = {
        tier.profile_name: [UnheardOfPage(PageKey(tier.namespace_digests[0], bytes(32)))] * 4
        for tier in runtime.tiers()
    }
    for _ in range(64):
        runtime.rates.prefill.forward_pass([64], [0], 0.01)
    assert runtime.rates.prefill.model() is not None
    assert runtime.restoring_pays(pages["exact"])
    runtime.rates.restore.part_ended(10_000, 1.0, None, "exact")
    runtime.rates.restore.renew()
    assert not runtime.restoring_pays(pages["exact"])
    assert runtime.holds_up(pages["exact"], 64, 100, True)
    # Nothing is known of it.
    assert runtime.restoring_pays(pages["raw"])
    runtime.rates.restore.part_ended(10_000, 1e-5, None, "raw")
    runtime.rates.restore.renew()
    assert runtime.restoring_pays(pages["raw"])
    assert not runtime.holds_up(pages["raw"], 64, 100, True)
    clock_s = time.monotonic()
    runtime.rates.restore._clock = lambda: clock_s + RESTORE_DOUBTED_S + 1
    assert runtime.restoring_pays(pages["exact"])


class FakeDecoders:
    """A source that keeps what it was prepared with."""

    def __init__(self, name, fits):
        self.name, self.threads, self.used_bytes = name, 5, 0
        self._fits = fits
        self.asked = None

    def prepare(self, sizes, pictures, *, most_bytes=None, bytes_beside=0):
        self.asked = sizes, pictures, most_bytes, bytes_beside
        self.threads, self.used_bytes = self._fits, self._fits * 3000


@pytest.mark.parametrize("name", ["nvdec", "software"])
def test_decoders_of_a_gpu_are_bounded_and_their_memory_is_told(name, caplog):
    decoders = FakeDecoders(name, 2)
    config = ServerConfig("grpc://127.0.0.1:1", gpu_memory_bytes=200 << 20)
    pool = PagedKVPool(SPEC, dict, torch.device("cpu"))
    with caplog.at_level(logging.INFO):
        runtime_module._prepare(decoders, pool, [(192, 192)], config, 0)
    beside = restore_buffer_bytes(SPEC, SEGMENT_PAGES, from_host=name == "software")
    assert decoders.asked == ([(192, 192)], SEGMENT_PAGES, 200 << 20, beside)
    assert counted("kvcodec_gpu_memory_bytes", part="bound") == 200 << 20
    assert counted("kvcodec_gpu_memory_bytes", part="decoders") == 6000
    assert counted("kvcodec_gpu_memory_bytes", part="restore") == 2 * beside
    assert counted("kvcodec_gpu_memory_bytes", part="pack") == 0
    assert "2 decoders took 0 MiB" in caplog.text


def test_what_packs_pages_is_part_of_the_bound():
    decoders = FakeDecoders("nvdec", 2)
    config = ServerConfig("grpc://127.0.0.1:1", gpu_memory_bytes=200 << 20)
    pool = PagedKVPool(SPEC, dict, torch.device("cpu"))
    on_host, on_device = (pack_buffer_bytes(SPEC, takes_device_canvases=takes) for takes in (False, True))
    assert on_device - on_host == DEVICE_CANVASES_BYTES
    runtime_module._prepare(decoders, pool, [(192, 192)], config, 0, on_device)
    assert decoders.asked[2] == (200 << 20) - on_device
    assert counted("kvcodec_gpu_memory_bytes", part="pack") == on_device
    decoders.asked = None
    with pytest.raises(ConfigurationError, match="nothing is left for decoders"):
        runtime_module._prepare(decoders, pool, [(192, 192)], config, 0, 200 << 20)
    assert decoders.asked is None


def test_a_page_that_takes_more_than_the_scratch_is_counted():
    wide = KVSpec(3, 64, 576, 64, KVDtype.BFLOAT16)
    assert pack_buffer_bytes(wide, takes_device_canvases=False) > 10 * wide.layer_values


def test_without_a_gpu_no_memory_of_one_is_bounded():
    decoders = FakeDecoders("software", 5)
    pool = PagedKVPool(SPEC, dict, torch.device("cpu"))
    runtime_module._prepare(decoders, pool, [(192, 192)], ServerConfig("grpc://127.0.0.1:1"), None)
    assert decoders.asked == ([(192, 192)], SEGMENT_PAGES, None, 0)
