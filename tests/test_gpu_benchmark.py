"""The benchmark of the GPU path, rehearsed whole: it must not fail for the first time on somebody's GPU."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks.gpu.table import as_text, summary

ROOT = pathlib.Path(__file__).parents[1]
PARTS = {
    *("environment", "ceilings", "exactness", "damage", "latency", "restore_identity", "restore_klt"),
    *("digest", "pipeline", "interference", "decode_rates", "encoder"),
}


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    results = set((ROOT / "benchmarks/results").glob("*"))
    child = run("--small", "--rehearse", "--out", str(out))
    assert child.returncode == 0, child.stdout + child.stderr
    assert set((ROOT / "benchmarks/results").glob("*")) == results
    return child.stdout, out


def test_every_part_runs_and_nothing_fails(rehearsal):
    _, out = rehearsal
    document = json.loads((out / "gpu-rehearsal.json").read_text())
    assert set(document["parts"]) == PARTS
    assert all(rows for rows in document["parts"].values())
    assert not any("failed" in row for rows in document["parts"].values() for row in rows)


def test_a_rehearsal_says_so_on_every_line_and_in_its_file(rehearsal):
    stdout, out = rehearsal
    *lines, last = stdout.splitlines()
    assert all(line.startswith("REHEARSAL ON A CPU") for line in lines)
    assert "gpu-rehearsal.json" in last
    assert [path.name for path in out.iterdir()] == ["gpu-rehearsal.json"]
    assert json.loads((out / "gpu-rehearsal.json").read_text())["is_rehearsal"] is True


def test_the_pictures_come_out_right(rehearsal):
    _, out = rehearsal
    parts = json.loads((out / "gpu-rehearsal.json").read_text())["parts"]
    assert all(row["is_exact"] for row in parts["exactness"])
    (damage,) = parts["damage"]
    assert damage["is_sound_after"]
    assert damage["raised"] + damage["found_by_digest"] + damage["same_samples"] == damage["tries"]


def test_full_sizes_are_not_rehearsed():
    child = run("--rehearse")
    assert (child.returncode, child.stdout) == (2, "")
    assert "--small" in child.stderr


def test_the_table_says_what_was_not_measured():
    rows = summary({"latency": [{"decoder": "warm", "first_picture_ms": 3.25}], "pipeline": [{"failed": "no"}]})
    measured = {name: value for name, value, _ in rows}
    assert measured["first picture of a warm pool, ms"] == "3.25"
    assert measured["pipeline through the host: tokens/s at 120 Ki values"] == "not measured"
    assert "REHEARSAL" not in as_text({"parts": {}, "is_rehearsal": False})


def test_it_needs_few_packages():
    """What is carried to a borrowed GPU: no server, no models, nothing of the tests."""
    blocked = (
        "sglang",
        "transformers",
        "grpc_reflection",
        "lmdb",
        "pytest",
        "hypothesis",
        "matplotlib",
        "rich",
        "tqdm",
    )
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "import benchmarks.gpu.__main__, benchmarks.gpu.kernel_parts, benchmarks.gpu.video_parts, benchmarks.gpu.table"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
