"""Where kernels run: in Triton's interpreter on the CPU, or on a GPU.

Whether a kernel is interpreted is settled when it is imported, for the whole process, and Triton's own functions with
it. So TRITON_INTERPRET is never set in a process that runs other tests: `test_interpreted.py` runs the tests of this
folder again in one of their own.
"""

import os

import pytest

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        device = "cpu" if IS_INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)
        metafunc.parametrize("device", [device])
