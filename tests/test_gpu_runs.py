"""What tests/conftest.py promises: GPU tests never pass for having run where they did not."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

CONFTEST = pathlib.Path(__file__).with_name("conftest.py")
ON_GPU = "import pytest\n@pytest.mark.gpu\ndef test_it():\n    pass\n"
ON_ENGINES = ON_GPU.replace("gpu", "nvdec")
SKIPPED = "import pytest\n@pytest.mark.gpu\ndef test_it():\n    pytest.skip('not today')\n"
SKIPPED_FIXTURE = (
    "import pytest\n@pytest.fixture\ndef it():\n    pytest.skip('not today')\n"
    "@pytest.mark.gpu\ndef test_it(it):\n    pass\n"
)
SKIPPED_MARK = "import pytest\n@pytest.mark.gpu\n@pytest.mark.skipif(True, reason='no')\ndef test_it():\n    pass\n"
SKIPPED_MODULE = "import pytest\npytest.skip('not today', allow_module_level=True)\n"
ON_CPU = "def test_of_the_cpu():\n    pass\n"
PASSED, FAILED, INTERRUPTED, USAGE, NOTHING = 0, 1, 2, 4, 5


def run(folder, source, required, has_gpu):
    """Exit status and output of a run with a torch that has a GPU or has none."""
    shutil.copy(CONFTEST, folder)
    (folder / "torch.py").write_text(f"class cuda:\n    is_available = staticmethod(lambda: {has_gpu})\n")
    (folder / "test_it.py").write_text(source)
    environment = os.environ | {"KVCODEC_REQUIRE_GPU": str(int(required)), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        "/dev/null",
        "--rootdir",
        ".",
        "-o",
        "markers=gpu: a GPU\nnvdec: its engines",
        ".",
    ]
    child = subprocess.run(
        command, cwd=folder, env=environment | {"PYTHONPATH": "."}, capture_output=True, text=True, timeout=100
    )
    return child.returncode, child.stdout + child.stderr


@pytest.mark.parametrize(
    ("source", "required", "has_gpu", "status", "says"),
    [
        (ON_GPU, False, False, NOTHING, "1 deselected"),
        (ON_GPU + ON_CPU, False, False, PASSED, "1 passed, 1 deselected"),
        (ON_GPU, False, True, PASSED, "1 passed"),
        (ON_GPU, True, True, PASSED, "1 passed"),
        (ON_GPU, True, False, USAGE, "no CUDA device"),
        (ON_ENGINES, False, False, NOTHING, "1 deselected"),
        (ON_ENGINES, True, False, USAGE, "no CUDA device"),
        (ON_ENGINES, True, True, PASSED, "1 passed"),
        (SKIPPED, False, True, PASSED, "1 skipped"),
        (SKIPPED, True, True, FAILED, "skipped although"),
        (SKIPPED_FIXTURE, True, True, FAILED, "skipped although"),
        (SKIPPED_MARK, True, True, FAILED, "skipped although"),
        (SKIPPED_MODULE, True, True, INTERRUPTED, "skipped although"),
        (ON_CPU, True, False, PASSED, "1 passed"),
    ],
)
def test_a_run(tmp_path, source, required, has_gpu, status, says):
    code, output = run(tmp_path, source, required, has_gpu)
    assert says in output
    assert code == status, output
