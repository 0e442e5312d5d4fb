"""Reports: what is written can be read again, and the picture has every method on it."""

import csv
import json

import pytest

from sglang_kvcodec.evaluation import report, tables
from sglang_kvcodec.evaluation.harness import Accuracy, MethodReport, Size
from sglang_kvcodec.evaluation.measures import Divergence, Recall
from sglang_kvcodec.format.spec import Side


def make_report(name, kl_nats, coded_bytes, ideal=True):
    bits = {Side.KEY: (3.0, 5.0), Side.VALUE: (4.0, 4.5)}
    size = Size("doc", 1600, coded_bytes, 10, bits, bits if ideal else None, {Side.KEY: 1e-4, Side.VALUE: 2e-4})
    accuracies = tuple(Accuracy(Divergence(kl, 2.0, 0.5), 7) for kl in (kl_nats, 3 * kl_nats))
    return MethodReport(name, (size, size), accuracies, (2.0, 1.5), 16, Recall(4, 2, 0, 0, 0.5), None)


REPORTS = [make_report("bf16", 0.0, 1600), make_report("kivi@4", 1e-4, 500, False), make_report("kivi@2", 1e-2, 300)]


def test_json_and_csv_hold_what_was_found(tmp_path):
    report.write_json(tmp_path / "a.json", {"model": "m"}, REPORTS)
    tables.write_csv(tmp_path / "a.csv", [found.summary() for found in REPORTS])
    tables.write_csv(tmp_path / "l.csv", report.layer_rows(REPORTS))
    document = json.loads((tmp_path / "a.json").read_text())
    assert document["settings"] == {"model": "m"}
    method = document["methods"][1]
    assert method["kl_nats"] == pytest.approx(2e-4)
    assert method["kl_standard_error_nats"] == pytest.approx(1e-4)
    assert method["ratio_to_bf16"] == 3.2
    assert method["greedy_agreement_share"] == 7 / 16
    assert method["needle_kept_share"] is None
    assert "multi_turn_right" not in method
    assert method["layer_bits"] == {"key": [3.0, 5.0], "value": [4.0, 4.5]}
    assert method["layer_ideal_bits"] == {"key": None, "value": None}
    assert [row["untouched_loss_nats"] for row in method["documents"]] == [2.0, 1.5]
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["bf16", "kivi@4", "kivi@2"]
    assert float(rows[2]["kl_nats"]) == pytest.approx(2e-2)
    with (tmp_path / "l.csv").open(newline="") as file:
        layers = list(csv.DictReader(file))
    assert len(layers) == 3 * 2 * 2
    assert layers[1] == {
        "method": "bf16",
        "side": "key",
        "layer": "1",
        "bits_per_value": "5.0",
        "ideal_bits_per_value": "5.0",
    }


def test_the_picture_names_every_family_and_parameter(tmp_path):
    report.draw(tmp_path / "a.svg", "a title", [found.summary() for found in REPORTS])
    drawn = (tmp_path / "a.svg").read_text()
    for words in ("a title", "kivi", "bf16", "KL divergence", "times smaller"):
        assert f"<!-- {words}" in drawn
    report.draw(tmp_path / "b.png", "nothing diverges", [REPORTS[0].summary()])
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_leaves_out_what_nobody_measured():
    rows = [{"method": "a", "x": 1.23456, "z": None}, {"method": "long-name", "x": 1e-5, "y": 3}]
    lines = tables.table(rows, {"method": "method", "x": "X", "y": "Y", "z": "Z", "w": "W"}).splitlines()
    assert lines[0].split() == ["method", "X", "Y"]
    assert lines[1].split() == ["a", "1.235", "-"]
    assert lines[2].split() == ["long-name", "1.00e-05", "3"]


def test_curves_are_compared_at_the_divergence_of_others():
    def row(method, kl, ratio):
        return {"method": method, "kl_nats": kl, "ratio_to_bf16": ratio}

    rows = [
        row("bf16", 0.0, 1.0),
        row("fp8", 1e-3, 2.0),
        row("kivi@4", 1e-1, 3.2),
        row("kivi@8", 1e-4, 1.8),
        row("cachegen@1", 1e-2, 9.0),
        row("cachegen@0.1", 1e-4, 4.0),
        row("high", 1e-3, 5.0),
    ]
    found = report.equal_divergence(rows)
    assert found["fp8"]["cachegen"] == pytest.approx(6.0)
    assert found["fp8"]["kivi"] == pytest.approx(1.8 ** (2 / 3) * 3.2 ** (1 / 3))
    # no extrapolation, and a single point is no curve
    assert found["kivi@4"] == {"kivi": pytest.approx(3.2)}
    assert report.equal_divergence(rows[:1]) == {}
    assert report.equal_divergence([{"method": "fp8", "ratio_to_bf16": 2.0}]) == {}
