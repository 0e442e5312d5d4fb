"""What is installed where: a peer needs neither torch nor SGLang, and nothing names the machine it was written on."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

IMPORT_PEER = """
import importlib, pkgutil, sys
blocked = sys.argv[1:]
for name in blocked:
    sys.modules[name] = None  # makes `import name` raise ImportError
import sglang_kvcodec
imported = ["sglang_kvcodec.errors", "sglang_kvcodec.config", "sglang_kvcodec.metrics"]
for layer in ("format", "storage", "rpc", "status", "cli"):
    package = importlib.import_module(f"sglang_kvcodec.{layer}")
    imported += [package.__name__]
    imported += [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in imported:
    importlib.import_module(name)
loaded = {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
assert not loaded & set(blocked), loaded & set(blocked)
print(len(imported))
"""


def test_the_peers_modules_need_no_torch_no_video_and_no_sglang():
    command = [sys.executable, "-W", "error", "-c", IMPORT_PEER, "torch", "av", "sglang", "triton", "PyNvVideoCodec"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) >= 10


def test_the_block_works():
    child = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['torch'] = None; import sglang_kvcodec.transform.base"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode != 0
    assert "torch" in child.stderr


def tracked_text_files() -> list[pathlib.Path]:
    """Every tracked file that is text. A source tree without git has nothing tracked: that is an error, not a pass."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    return [path for path in files if b"\0" not in path.read_bytes()]


def test_no_tracked_file_names_a_machine():
    machine_path = re.compile(
        r"(?<![\w.])/(?:work|root|home|mnt|opt)/\w|(?:extra-)?index-url|--find-links|trusted-host"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in tracked_text_files()
        if path != pathlib.Path(__file__)
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if machine_path.search(line)
    ]
    assert found == []


def test_the_locked_environment_pins_everything_exactly():
    lines = (ROOT / "requirements/locked.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 100
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line)] == []
    assert "sglang==0.5.23" in pins


@pytest.mark.parametrize("script", ["scripts/demo", "scripts/test", "scripts/lint", "scripts/gen-protos", ".ci/run"])
def test_scripts_can_be_run(script):
    path = ROOT / script
    assert path.stat().st_mode & 0o111, f"{script} is not executable"
    subprocess.run(["bash", "-n", path], check=True, timeout=30)
