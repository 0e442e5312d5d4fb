"""What a calibration loses on text of kinds that it has not seen: every kind of text that ships against every other.

Calibrates on each kind alone and on all together, with the same number of tokens, and runs ``kvcodec bench accuracy``
on each kind. ``share_of_own`` compares ratios where both diverge as much as the own kind's tier does, both logarithms
interpolated between tiers; there is none beyond the last one.
``python -m benchmarks.bench_foreign_text [--model PATH]``
"""

import argparse
import itertools
import json
import math
import pathlib
import tempfile

from benchmarks.record import record
from sglang_kvcodec.cli.main import main as kvcodec
from sglang_kvcodec.evaluation.text import KINDS, shipped_texts

REPOSITORY = pathlib.Path(__file__).parents[1]
PASSAGES = ["--prefix-tokens", 512, "--continuation-tokens", 256]
CALIBRATE = ["--documents", 18, "--gradient-documents", 6, "--search-documents", 5, *PASSAGES]
TIERS = ("high", "balanced", "compact")
MEASURE = ["--methods", ",".join(TIERS), "--documents", 2, "--needles", 0, "--conversations", 0, "--greedy-tokens", 0]


def run(*arguments):
    status = kvcodec([str(argument) for argument in arguments])
    if status:
        raise SystemExit(status)


def ratio_at(curve, kl_nats):
    """The ratio of a curve of (divergence, ratio) at a divergence; None outside."""
    for (low, low_ratio), (high, high_ratio) in itertools.pairwise(sorted(curve)):
        if low <= kl_nats <= high:
            share = math.log(kl_nats / low) / math.log(high / low)
            return low_ratio ** (1 - share) * high_ratio**share
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=pathlib.Path, default=REPOSITORY / "tests/models/tiny-code-lm")
    model = parser.parse_args().model
    curves = {}
    with tempfile.TemporaryDirectory() as temporary:
        for calibrated_on in (*KINDS, "all"):
            directory = pathlib.Path(temporary, calibrated_on)
            directory.mkdir()
            files = []
            for text in shipped_texts("calibration", KINDS if calibrated_on == "all" else [calibrated_on]):
                files.append(directory / f"{text.kind}-{text.name}.txt")
                files[-1].write_text(text.content, encoding="utf-8")
            run("calibrate", "--model", model, "--out", directory, *CALIBRATE, "--text", *files)
            artifact = directory / "calibration-0-of-1.safetensors"
            for kind in KINDS:
                out = directory / kind
                options = ["--kinds", kind, "--calibration", artifact, "--out", out, "--no-picture"]
                run("bench", "accuracy", "--model", model, *MEASURE, *options)
                methods = json.loads((out / "accuracy.json").read_text())["methods"]
                found = {method["method"]: method for method in methods}
                curves[calibrated_on, kind] = [(found[t]["kl_nats"], found[t]["ratio_to_bf16"]) for t in TIERS]
    rows = []
    for (calibrated_on, kind), curve in curves.items():
        for tier, (kl_nats, ratio), (own_kl_nats, own_ratio) in zip(TIERS, curve, curves[kind, kind], strict=True):
            at_equal = ratio_at(curve, own_kl_nats)
            rows.append(
                {
                    "model": model.name,
                    "calibrated_on": calibrated_on,
                    "measured_on": kind,
                    "tier": tier,
                    "ratio_to_bf16": round(ratio, 3),
                    "kl_nats": kl_nats,
                    "share_of_own": None if at_equal is None else round(at_equal / own_ratio, 3),
                }
            )
    print(record("foreign-text", rows))


if __name__ == "__main__":
    main()
