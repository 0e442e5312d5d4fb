"""Where kernels run: in Triton's interpreter on the CPU, or on a GPU.

Whether a kernel is interpreted is settled when it is imported, for the whole process, and Triton's own functions with
it. So TRITON_INTERPRET is never set in a process that runs other tests: `test_interpreted.py` runs the tests of this
folder again in one of their own.
"""

import os

import pytest

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_generate_tests(metafunc):
    on_gpu = {"device": pytest.mark.gpu, "engine": pytest.mark.nvdec}
    for name, mark in on_gpu.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, ["cpu" if IS_INTERPRETED else pytest.param("cuda", marks=mark)])


def pytest_collection_modifyitems(config, items):
    if not IS_INTERPRETED:
        rehearsals = [item for item in items if item.get_closest_marker("rehearsal")]
        config.hook.pytest_deselected(items=rehearsals)
        items[:] = [item for item in items if item not in rehearsals]
