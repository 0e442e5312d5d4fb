"""The benchmark of the GPU path, rehearsed whole: it must not fail for the first time on somebody's GPU."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks.gpu.table import as_text, summary

ROOT = pathlib.Path(__file__).parents[1]
PARTS = {
    *("environment", "capabilities", "ceilings", "exactness", "damage", "latency", "restore_identity", "restore_klt"),
    *("digest", "pack", "pipeline", "interference", "decode_rates", "encoder"),
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


def test_pages_go_through_the_restorer_and_a_model_runs_beside(rehearsal):
    _, out = rehearsal
    parts = json.loads((out / "gpu-rehearsal.json").read_text())["parts"]
    (row,) = parts["pipeline"]
    assert (row["tier"], row["layers_per_basis"], row["workers"]) == ("high", 1, 2)
    # Real pictures: less than what noise of all values would take, more than nothing.
    assert 2 < row["picture_bits_per_value"] < 6
    assert row["limit"].split(",")[0] in ("NVDEC", "kernels")
    assert [row["loop"] for row in parts["interference"]] == ["matrix products", "decode steps"]
    assert {row["pictures"] for row in parts["decode_rates"]} == {"noise", "high, real, basis over 3"}


def test_what_is_asked_of_a_first_gpu_is_answered(rehearsal):
    """Formats and engines; streams of others; rates against bits; latency alone and beside products; damage."""
    _, out = rehearsal
    parts = json.loads((out / "gpu-rehearsal.json").read_text())["parts"]
    asked = {(row.get("codec"), row.get("chroma")) for row in parts["capabilities"]}
    assert asked >= {("HEVC", "420"), ("HEVC", "444"), ("HEVC", "Monochrome"), ("AV1", "420")}
    assert "clocks" in parts["capabilities"][-1]
    assert len({row["stream"] for row in parts["exactness"]}) == 5
    assert {row.get("decoder") for row in parts["latency"]} >= {"new", "warm", "warm, again", "warm, beside products"}


def test_full_sizes_are_not_rehearsed():
    child = run("--rehearse")
    assert (child.returncode, child.stdout) == (2, "")
    assert "--small" in child.stderr


def test_the_table_says_what_was_not_measured():
    rows = summary({"latency": [{"decoder": "warm", "first_picture_ms": 3.25}], "pipeline": [{"failed": "no"}]})
    measured = {name: value for name, value, _ in rows}
    assert measured["first picture of a warm pool, ms"] == "3.25"
    assert measured["pipeline, high, basis over 3: tokens/s at 120 Ki values"] == "not measured"
    assert measured["slow-down of decode steps, basis over 1"] == "not measured"
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
        "import benchmarks.gpu.__main__, benchmarks.gpu.kernel_parts, benchmarks.gpu.pipeline_parts\n"
        "import benchmarks.gpu.video_parts, benchmarks.gpu.real_kv, benchmarks.gpu.table"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
