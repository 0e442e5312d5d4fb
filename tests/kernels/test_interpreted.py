"""Runs the kernels' tests in a process of their own, interpreted on the CPU."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
IN_CHILD = os.environ.get("TRITON_INTERPRET") == "1"
MODULES = ["test_restore", "test_restore_properties", "test_check", "test_page_to_pool"]


@pytest.mark.parametrize("module", [] if IN_CHILD else MODULES)
def test_in_the_interpreter(module):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu", str(HERE / f"{module}.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "KVCODEC_REQUIRE_GPU": "0"}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert child.returncode == 0, child.stdout + child.stderr
    assert re.search(r"\d+ passed", child.stdout)
    assert not re.search(r"\d+ (skipped|failed|errors?)", child.stdout)
