"""Runs the kernels' tests in a process of their own, interpreted on the CPU."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
LONG = ("test_frames_to_pool.py", "test_pack_kernels.py", "test_page_packer.py")
"""In processes of their own."""


@pytest.mark.parametrize(
    ("paths", "least"),
    [([*(f"--ignore={HERE / name}" for name in LONG), str(HERE)], 100), *(([str(HERE / name)], 10) for name in LONG)],
    ids=["others", *LONG],
)
def test_all_tests_of_this_folder_in_the_interpreter(paths, least):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "[cpu", *paths]
    environment = os.environ | {"TRITON_INTERPRET": "1", "KVCODEC_REQUIRE_GPU": "0"}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    report = child.stdout + child.stderr
    assert child.returncode == 0, report
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed is not None, report
    assert int(passed[1]) >= least, report
    assert " skipped" not in child.stdout, report
