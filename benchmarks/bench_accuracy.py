"""What the calibrated tiers cost a model's accuracy and what they save, beside others.

Runs ``kvcodec calibrate``, unless a calibration is given, and ``kvcodec bench accuracy`` on the texts that ship; keeps
the figures with machine and versions, and draws ``docs/images/accuracy-MODEL.svg``.
``python -m benchmarks.bench_accuracy [--model PATH] [--calibrate "OPTIONS of kvcodec calibrate"] [--methods A,B]
[--calibration FILE] [more options of kvcodec bench accuracy]``
"""

import argparse
import json
import pathlib
import shlex
import shutil
import tempfile

from benchmarks.record import record
from sglang_kvcodec.cli.main import main as kvcodec
from sglang_kvcodec.format.calibration import Calibration

REPOSITORY = pathlib.Path(__file__).parents[1]
METHODS = (
    "bf16,exact,high,balanced,compact,uncalibrated,fp8,int8,int8-x265,kivi@4,kivi@2,cachegen@0.125,cachegen@0.25,"
    "cachegen@0.5,cachegen@1,lmcache-cachegen@4,lmcache-cachegen@2,lmcache-cachegen@1,zstd@3,lz4"
)


def run(*arguments):
    status = kvcodec([str(argument) for argument in arguments])
    if status:
        raise SystemExit(status)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, default=REPOSITORY / "tests/models/tiny-code-lm")
    parser.add_argument("--calibration", type=pathlib.Path)
    parser.add_argument("--calibrate", default="")
    parser.add_argument("--methods", default=METHODS)
    arguments, more = parser.parse_known_args()
    name = arguments.model.stem.split(".")[0].lower()
    with tempfile.TemporaryDirectory() as directory:
        calibration = arguments.calibration
        if calibration is None:
            run("calibrate", "--model", arguments.model, "--out", directory, *shlex.split(arguments.calibrate))
            calibration = pathlib.Path(directory, "calibration-0-of-1.safetensors")
        options = ["--calibration", calibration, "--methods", arguments.methods, "--out", directory, *more]
        run("bench", "accuracy", "--model", arguments.model, *options)
        found = json.loads(pathlib.Path(directory, "accuracy.json").read_text())
        made = Calibration.from_bytes(calibration.read_bytes())
        images = REPOSITORY / "docs/images"
        images.mkdir(exist_ok=True)
        shutil.copy(pathlib.Path(directory, "accuracy.svg"), images / f"accuracy-{name}.svg")
    settings = {
        **found["settings"],
        "equal_divergence": found["equal_divergence"],
        "calibration_notes": made.notes,
        "calibration_expected": {name: tier.expected for name, tier in made.tiers.items()},
    }
    rows = [{**method, "documents": len(method["documents"]), "settings": settings} for method in found["methods"]]
    print(record(f"accuracy-{name}", rows))


if __name__ == "__main__":
    main()
