import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_kit import assert_restores, hard_values, pool_with

from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups, picture_geometry
from sglang_kvcodec.kernels import open_restore
from sglang_kvcodec.kernels.exact_pack import ExactPack

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(
    profile=st.sampled_from(["high", "exact"]),
    spec=st.builds(
        KVSpec,
        layers=st.integers(1, 4),
        kv_heads=st.integers(1, 5),
        head_dim=st.sampled_from([1, 7, 33, 64, 80]),
        page_tokens=st.integers(1, 20),
        dtype=st.sampled_from([KVDtype.BFLOAT16, KVDtype.FLOAT16]),
    ),
    pages=st.integers(1, 3),
    data=st.data(),
)
def test_any_small_shape(profile, spec, pages, data, device):
    layers = data.draw(st.integers(1, min(spec.layers, picture_geometry(spec).layers_per_picture)))
    assert_restores(profile, spec, pages, layers, device, seed=data.draw(st.integers(0, 99)))


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(
    spec=st.builds(
        KVSpec,
        layers=st.integers(1, 4),
        kv_heads=st.integers(1, 5),
        head_dim=st.sampled_from([1, 7, 33, 64, 80]),
        page_tokens=st.integers(1, 20),
        dtype=st.sampled_from(list(KVDtype)),
    ),
    pages=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_what_was_packed_comes_back_over_whatever_was_in_its_slots(spec, pages, seed, device):
    group = layer_groups(spec)[-1]
    pool = pool_with(spec, hard_values("exact", spec, pages, group.layers, seed), device, seed)
    before = pool.bits()
    packed = ExactPack(spec).pack(group, Side.KEY, [0] * pages, pool.slots, pool.buffers)
    for buffer in pool.buffers:
        buffer.view(torch.uint8)[pool.slots] ^= 0x5A
    open_restore("exact", spec).restore(packed, pool.slots, pool.buffers)
    assert torch.equal(pool.bits(), before)
