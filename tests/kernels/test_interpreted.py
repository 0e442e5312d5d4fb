"""Runs the kernels' tests in a process of their own, interpreted on the CPU."""

import os
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


def test_all_kernel_tests_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "[cpu", str(HERE)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "KVCODEC_REQUIRE_GPU": "0"}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    report = child.stdout + child.stderr
    assert child.returncode == 0, report
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed is not None, report
    assert int(passed[1]) >= 150, report
    assert " skipped" not in child.stdout, report
