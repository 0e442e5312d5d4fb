"""Tests of a GPU run where there is one, and never pass without one when KVCODEC_REQUIRE_GPU is set."""

import ctypes
import os
import sys

import pytest

pytest.register_assert_rewrite("sglang_kvcodec.testing.storage", "sglang_kvcodec.testing.artifacts")

GPU_IS_REQUIRED = os.environ.get("KVCODEC_REQUIRE_GPU") == "1"


def pytest_collection_modifyitems(config, items):
    on_gpu = [item for item in items if item.get_closest_marker("gpu") or item.get_closest_marker("nvdec")]
    if not on_gpu:
        return
    import torch  # not before: most tests need none

    if torch.cuda.is_available():
        return
    if GPU_IS_REQUIRED:
        raise pytest.UsageError("KVCODEC_REQUIRE_GPU is set, but there is no CUDA device")
    config.hook.pytest_deselected(items=on_gpu)
    items[:] = [item for item in items if item not in on_gpu]


def refuse_skip(report):
    if GPU_IS_REQUIRED and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped although KVCODEC_REQUIRE_GPU is set: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return refuse_skip((yield))


def pytest_unconfigure():
    """Keeps SWIG's modules for ever: sentencepiece's reads a type of another module when it is freed, which ends the
    interpreter with a segmentation fault after the last test where that one was freed first."""
    for name, module in list(sys.modules.items()):
        if name.startswith("swig_runtime_data"):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))
