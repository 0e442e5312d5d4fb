"""The generated protobuf and gRPC modules are those that protos/ gives."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_generated_code_is_current(tmp_path):
    subprocess.run(
        [ROOT / "scripts/gen-protos", tmp_path],
        env=os.environ | {"PYTHON": sys.executable},
        check=True,
        capture_output=True,
        timeout=120,
    )
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*") if path.is_file()}
    package = ROOT / "sglang_kvcodec"
    committed = {
        path.relative_to(ROOT): path.read_text() for path in package.rglob("*_pb2*.py*") if path.suffix != ".pyc"
    }
    assert len(fresh) == 8
    assert committed == fresh
