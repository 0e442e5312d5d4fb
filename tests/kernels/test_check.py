import pytest
import torch

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.format.spec import KVDtype, KVSpec, layer_groups
from sglang_kvcodec.kernels import check_restore, open_restore
from sglang_kvcodec.transform import get_transform

SPEC = KVSpec(layers=4, kv_heads=2, head_dim=128, page_tokens=64, dtype=KVDtype.BFLOAT16)
CASES = [("exact", dtype) for dtype in KVDtype] + [("high", KVDtype.BFLOAT16), ("high", KVDtype.FLOAT16)]


class Reference:
    """A kernel in name only: what the reference restores, written slot by slot, then spoiled."""

    def __init__(self, profile, spec, spoil=lambda buffers: None):
        self._transform, self._spoil = get_transform(profile, spec), spoil
        self.layers = []

    def restore(self, packed, slots, buffers):
        self.layers.append(len(buffers))
        values = self._transform.restore(len(buffers), packed)
        for index, buffer in enumerate(buffers):
            for slot, value in zip(slots.tolist(), values[:, index].flatten(0, 1), strict=True):
                buffer[slot] = value
        self._spoil(buffers)


@pytest.mark.parametrize("profile", ["exact", "high"])
def test_each_size_of_group_is_checked(profile):
    assert [group.layers for group in layer_groups(SPEC)] == [3, 1]
    kernel = Reference(profile, SPEC)
    check_restore(kernel, profile, SPEC, torch.device("cpu"))
    assert kernel.layers == [1, 3]


@pytest.mark.parametrize("slot", [0, 1, -1])
@pytest.mark.parametrize("profile", ["exact", "high"])
def test_one_wrong_bit_is_refused(profile, slot):
    def spoil(buffers):
        buffers[-1].view(torch.int16)[slot, -1, -1] ^= 1

    with pytest.raises(ConfigurationError, match="wrong values on cpu"):
        check_restore(Reference(profile, SPEC, spoil), profile, SPEC, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(("profile", "dtype"), CASES)
def test_the_kernels_pass(profile, dtype, device):
    spec = KVSpec(layers=2, kv_heads=1, head_dim=64, page_tokens=16, dtype=dtype)
    check_restore(open_restore(profile, spec), profile, spec, torch.device(device))
