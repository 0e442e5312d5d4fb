"""Tests of a GPU run where there is one, and never pass without one when KVCODEC_REQUIRE_GPU is set; small disks."""

import contextlib
import ctypes
import os
import subprocess
import sys

import pytest

pytest.register_assert_rewrite("sglang_kvcodec.testing.storage", "sglang_kvcodec.testing.artifacts")

with contextlib.suppress(ImportError):
    # Not on a machine that is there for its GPU alone.
    import hypothesis

    # How long an example takes says nothing: machines are busy.
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")

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


@pytest.fixture
def mount_disk(tmp_path):
    """Mounts a disk of so many MiB in memory until the test ends; skips the test where that can't be done."""
    with contextlib.ExitStack() as mounted:

        def mount(mib):
            if os.geteuid() != 0:
                pytest.skip("mounting a small disk needs root; test_a_file_that_may_not_grow covers most of it")
            disk = tmp_path / "disk"
            disk.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", disk]
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            if answer.returncode:
                pytest.skip(f"this machine can't mount a small disk: {answer.stderr.strip()}")
            mounted.callback(subprocess.run, ["umount", "--lazy", disk], check=True)
            return disk

        yield mount


def pytest_unconfigure():
    """Keeps SWIG's modules for ever: sentencepiece's reads a type of another module when it is freed, which ends the
    interpreter with a segmentation fault after the last test where that one was freed first."""
    for name, module in list(sys.modules.items()):
        if name.startswith("swig_runtime_data"):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))
