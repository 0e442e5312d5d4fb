"""``kvcodec bench ttft`` from end to end: a peer, three servers, SGLang's load generator, pictures."""

import csv
import json
import os
import xml.etree.ElementTree

import pytest
from integration.cluster import MODEL

from sglang_kvcodec.cli.main import main
from sglang_kvcodec.testing.processes import process_tree

pytestmark = pytest.mark.sglang

PREFIX_TOKENS = 320


def words_of(path):
    return " | ".join(element.text for element in xml.etree.ElementTree.parse(path).iter() if element.text)


@pytest.mark.timeout(900)
def test_a_sweep_from_end_to_end(tmp_path, capfd):
    out = tmp_path / "out"
    before = process_tree(os.getpid())
    load = ["--prefix-tokens", str(PREFIX_TOKENS), "--repeats", "1", "--settle", "1", "--answer-tokens", "8"]
    # All prefill in the same chunks: other chunks round differently, which shows in the words now and then.
    servers = ["--profile", "exact", "--bandwidth", "50Mbps", "--server-args", "--chunked-prefill-size 256"]
    serving = ["--serving", "--serving-prefixes", "1", "--serving-concurrency", "1"]
    status = main(["bench", "ttft", "--model", MODEL, *servers, *load, *serving, "--out", str(out)])
    captured = capfd.readouterr()
    assert status == 0, captured.err[-3000:]
    assert process_tree(os.getpid()) == before

    document = json.loads((out / "ttft.json").read_text())
    assert document["broken_words"] == []
    rows = {row["method"]: row for row in document["rows"]}
    methods = ("prefill", "device", "exact", "planner", "planner_first")
    assert set(rows) == set(methods)
    assert {row["bandwidth"] for row in document["rows"]} == set(document["planner_over_best"]) == {"50Mbps"}
    assert rows["exact"]["cached_storage_tokens_median"] >= PREFIX_TOKENS - 64
    assert rows["exact"]["fetched_bytes_median"] > 0
    assert rows["exact"]["compression_ratio"] > 1
    assert rows["exact"]["same_words"] == 1
    assert rows["prefill"]["cached_storage_tokens_median"] == 0
    assert rows["planner"]["reasons"] != "none"
    assert document["planner_over_best"]["50Mbps"] > 0
    assert document["versions"]["sglang"] == "0.5.23"

    served = {(row["method"], row["bandwidth"]): row for row in document["serving"]}
    assert set(served) == {("prefill", None), ("planner", "50Mbps")}
    for row in served.values():
        assert row["completed"] == 2
        assert 0 < row["median_ttft_ms"] <= row["p99_ttft_ms"]
        assert row["output_tokens_per_s"] > 0

    with (out / "ttft.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert all(method.replace("_", ", ") in words_of(out / "ttft.svg") for method in methods)
    gantt = words_of(out / "gantt.svg")
    assert "request " in gantt
    assert "lookup" in gantt
    assert "forward" in gantt

    # The planner's trace is there for the stand-alone picture too.
    assert main(["bench", "gantt", str(out / "trace.json"), "--out", str(tmp_path / "g.svg")]) == 0
