"""Page objects through the picture decoder and the kernel into a pool, as the restorer's threads do it."""

import threading

import pytest
import torch

from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.flow.page_codec import GroupDecoder, PageEncoder
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.spec import KVDtype, KVSpec, layer_groups
from sglang_kvcodec.kernels import open_restore
from sglang_kvcodec.testing.kv_pool import KnownPool, same_bits
from sglang_kvcodec.testing.synthetic import page_values
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.video import open_decoder, open_encoder

SPEC = KVSpec(layers=4, kv_heads=2, head_dim=128, page_tokens=64, dtype=KVDtype.BFLOAT16)
PAGES = [3, 0]


@pytest.mark.parametrize("profile", ["exact", "high"])
def test_pool_is_the_same_as_without_kernel(profile, device):
    encoder = PageEncoder(bytes(32), PageTransforms(SPEC, profile), open_encoder("software"))
    objects = [PageObject(encoder.encode(bytes([page]) * 32, page_values(SPEC, page))) for page in PAGES]
    known = KnownPool(SPEC, 4)
    before = known.bits()
    on_device = {side: [layer.to(device, copy=True) for layer in layers] for side, layers in known.buffers.items()}
    pool = PagedKVPool(SPEC, lambda: on_device, torch.device(device))
    decoder, kernel = GroupDecoder(PageTransforms(SPEC, profile), open_decoder("software")), open_restore(profile, SPEC)
    slots = known.slots(PAGES)
    event = [torch.cuda.Event()] if device == "cuda" else []
    slots_on_device = slots.to(device)
    for each in event:
        each.record()

    def restore():
        for group in layer_groups(SPEC):
            for side in SPEC.sides:
                packed = decoder.unpack(objects, group.index, side)
                with pool.writing(side, group.first_layer, group.layers, event) as layers:
                    kernel.restore(packed, slots_on_device, layers)

    # A thread of its own, as in a server: on a GPU it has its own stream.
    thread = threading.Thread(target=restore)
    thread.start()
    thread.join()
    for group in layer_groups(SPEC):
        for side in SPEC.sides:
            with known.wrapped.writing(side, group.first_layer, group.layers) as layers:
                known.wrapped.write(layers, decoder.decode(objects, group.index, side), slots)
    assert known.others_are(before, PAGES)
    assert not same_bits({0: before[SPEC.sides[0]]}, {0: known.bits()[SPEC.sides[0]]})
    on_host = {side: [layer.cpu() for layer in layers] for side, layers in on_device.items()}
    for side, layers in known.buffers.items():
        assert same_bits(dict(enumerate(on_host[side])), dict(enumerate(layers)))
