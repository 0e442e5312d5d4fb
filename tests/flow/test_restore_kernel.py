import logging
import sys

import pytest
import torch

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.flow import restore_kernel as restore_kernel_module
from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.flow.restore_kernel import restore_kernels
from sglang_kvcodec.format.spec import KVDtype, KVSpec, picture_geometry
from sglang_kvcodec.testing.calibrations import random_calibration
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.transform.klt import KltTransform

SPEC = KVSpec(layers=4, kv_heads=1, head_dim=64, page_tokens=16, dtype=KVDtype.BFLOAT16)


def pool_on(device):
    """Of a pool that is never written to, only the device counts."""
    return PagedKVPool(SPEC, dict, torch.device(device))


@pytest.mark.parametrize("profile", ["raw", "exact", "high"])
def test_a_pool_in_host_memory_needs_no_kernel_and_no_triton(profile, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "sglang_kvcodec.kernels.restore", raising=False)
    with caplog.at_level(logging.INFO):
        assert restore_kernels(pool_on("cpu"), PageTransforms(SPEC, profile)) is None
    assert [record.message for record in caplog.records] == [
        "kvcodec: pages are restored on the host, the pool is on cpu"
    ]


@pytest.mark.parametrize("profile", ["exact", "high"])
def test_a_pool_on_a_gpu_without_triton_is_refused(profile, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "sglang_kvcodec.kernels.restore", raising=False)
    with pytest.raises(ConfigurationError, match="needs Triton"):
        restore_kernels(pool_on("cuda:0"), PageTransforms(SPEC, profile))


def test_raw_pages_are_copied_to_a_gpu(caplog):
    with caplog.at_level(logging.INFO):
        assert restore_kernels(pool_on("cuda:0"), PageTransforms(SPEC, "raw")) is None
    assert "is copied to cuda:0 as it is" in caplog.text


@pytest.mark.parametrize("profile", ["exact", "high"])
def test_a_kernel_is_checked_on_its_device_before_it_is_used(profile, caplog, monkeypatch):
    checked, digests = [], []
    monkeypatch.setattr(restore_kernel_module, "check_restore", lambda *args: checked.append(args))
    monkeypatch.setattr(restore_kernel_module, "check_digest", lambda *args: digests.append(args))
    with caplog.at_level(logging.INFO):
        kernels = restore_kernels(pool_on("cuda:0"), PageTransforms(SPEC, profile))
    assert [each[1:] for each in checked] == [(profile, SPEC, torch.device("cuda:0"))]
    assert digests == [(picture_geometry(SPEC).canvas_shape, torch.device("cuda:0"))]
    assert kernels.spec == SPEC
    assert "by a Triton kernel on cuda:0" in caplog.text


def test_with_a_calibration_its_kernel_is_checked_and_those_of_pages_that_come_with_it(monkeypatch):
    """Exact pages among calibrated ones, and pages of the time before the calibration."""
    plain, calibrated, digests = [], [], []
    monkeypatch.setattr(restore_kernel_module, "check_digest", lambda *args: digests.append(args[0]))
    monkeypatch.setattr(restore_kernel_module, "check_restore", lambda *args: plain.append(args[1]))
    monkeypatch.setattr(restore_kernel_module, "check_calibrated", lambda *args: calibrated.append(args))
    monkeypatch.setattr(restore_kernel_module.PageRestores, "get", lambda self, *coding: coding)
    calibration = random_calibration(SPEC)
    transforms = PageTransforms(SPEC, "high", [calibration])
    restore_kernels(pool_on("cuda:0"), transforms, calibration.digest)
    assert sorted(plain) == ["exact", "high"]
    [(kernel, reference, *rest)] = calibrated
    assert kernel == ("high", calibration.digest)
    assert isinstance(reference, KltTransform)
    assert digests == [picture_geometry(SPEC).canvas_shape, reference.canvas_shape]
    assert rest == [calibration, "high", torch.device("cuda:0")]
