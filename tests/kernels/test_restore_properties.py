import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_kit import assert_restores

from sglang_kvcodec.format.spec import KVDtype, KVSpec, picture_geometry

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
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
