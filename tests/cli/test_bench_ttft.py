"""``kvcodec bench ttft`` and ``gantt``: what they refuse, and what they write about servers that run already."""

import csv
import json
import signal
import subprocess
import sys
import xml.etree.ElementTree

import pytest
from latency.fake_sglang import FakeSGLang
from latency.trace_kit import computed, fetched, tracer

from sglang_kvcodec.cli.main import main

SMALL = ["--prefix-tokens", "300", "--repeats", "2", "--settle", "0", "--answer-tokens", "4"]


def words_of(path):
    return " | ".join(element.text for element in xml.etree.ElementTree.parse(path).iter() if element.text)


@pytest.mark.parametrize(("bench", "option"), [("ttft", "--planner-profile A,B"), ("gantt", "--request RID")])
def test_help(capsys, bench, option):
    with pytest.raises(SystemExit) as caught:
        main(["bench", bench, "--help"])
    assert caught.value.code == 0
    assert option in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--model is needed"),
        (["--model", "m", "--bandwidth", "10Mbps,fast"], "not a bandwidth: 'fast'"),
        (["--model", "m", "--bandwidth", "1Gbps,1Gbps"], "one is there twice"),
        (["--model", "m", "--profile", "exact,best"], "unknown best; there are raw"),
        (["--model", "m", "--planner-profile", "exact,high"], "can't be stored beside lossy ones"),
        (["--model", "/no/such/model"], "there is no model at /no/such/model"),
        (["--model", "m", "--repeats", "0"], "--repeats must be at least 1"),
        (["--model", "m", "--load", "multi-turn", "--turns", "1"], "--turns must be at least 2"),
        (["--model", "m", "--capacity", "much"], "much"),
        (["--model", "m", "--calibration", "no-such-file"], "can't read no-such-file"),
        (["--model", "m", "--baseline", "http://127.0.0.1:1"], "--server and --baseline go together"),
        (["--server", "http://127.0.0.1:1"], "--server and --baseline go together"),
        (["--server", "a", "--baseline", "b", "--bandwidth", "1Gbps"], "measured as it is"),
        (["--server", "a", "--baseline", "b", "--one-at-a-time"], "--one-at-a-time is for servers of its own"),
        (["--server", "a", "--baseline", "b", "--profile", "best"], "unknown profile 'best'"),
        (
            ["--server", "http://127.0.0.1:1", "--baseline", "http://127.0.0.1:1"],
            "no SGLang server answers at http://127.0.0.1:1",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(capfd, arguments, words):
    assert main(["bench", "ttft", *arguments]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("kvcodec: ")
    assert words in last


@pytest.mark.parametrize(
    ("missing", "words"), [("sglang", "sglang-kvcodec[sglang]"), ("matplotlib", "sglang-kvcodec[bench]")]
)
def test_without_its_libraries_it_says_what_to_install(missing, words, tmp_path):
    script = (
        "import sys; sys.modules[sys.argv[1]] = None\n"
        "from sglang_kvcodec.cli.main import main; sys.exit(main(sys.argv[2:]))"
    )
    command = [sys.executable, "-c", script, missing, "bench", "ttft", "--model", "m", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_server_that_does_not_start_is_told_with_the_end_of_its_log(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    arguments = ["--server-args", "--no-such-flag 7", "--profile", "exact", *SMALL]
    assert main(["bench", "ttft", "--model", "some/model", *arguments]) == 1
    err = capfd.readouterr().err
    assert "prefill ended with" in err
    assert "--no-such-flag" in err
    (work_dir,) = tmp_path.glob("kvcodec-bench-*")
    assert f"logs are in {work_dir}" in err
    assert [path.name for path in work_dir.iterdir()] == ["prefill.log"]


@pytest.fixture
def servers():
    with FakeSGLang() as server, FakeSGLang(kvcodec=False) as baseline:
        yield server, baseline


def urls(servers):
    server, baseline = servers
    return ["--server", server.url, "--baseline", baseline.url]


@pytest.mark.parametrize("load", ["shared-prefix", "multi-turn"])
def test_servers_that_run_are_measured_as_they_are(servers, capfd, tmp_path, load):
    out = tmp_path / "new/out"
    options = ["--profile", "exact", "--load", load, "--out", str(out), *SMALL]
    assert main(["bench", "ttft", *urls(servers), *options]) == 0
    captured = capfd.readouterr()
    assert "exact (lossless): 2 of 2 answers are those of the server without kvcodec" in captured.out
    assert f"written to {out}: ttft.json, ttft.csv, ttft.svg" in captured.out
    assert "12/12" in captured.err
    document = json.loads((out / "ttft.json").read_text())
    assert document["configuration"]["model"] == "a-model"
    assert document["configuration"]["load"] == load
    assert document["planner_over_best"] == {}
    rows = {row["method"]: row for row in document["rows"]}
    assert list(rows) == ["prefill", "device", "exact"]
    assert {row["bandwidth"] for row in rows.values()} == {"as is"}
    assert rows["exact"]["cached_storage_tokens_median"] >= 256
    assert rows["exact"]["fetched_bytes_median"] == 100 * rows["exact"]["cached_storage_tokens_median"]
    assert rows["prefill"]["ratio_to_prefill_median"] == 1.0
    assert {"cpu", "cores", "gpus"} == set(document["machine"])
    assert len(document["samples"]) == 6
    with (out / "ttft.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == list(rows)
    for column in ("machine_cpu", "versions_sglang", "configuration_model", "configuration_load", "date"):
        assert all(line[column] for line in lines)
    assert "exact" in words_of(out / "ttft.svg")


def test_other_words_of_a_lossless_tier_fail_and_are_told(servers, capfd, tmp_path):
    servers[0].answer = lambda prompt: "something else"
    options = ["--profile", "exact", "--no-picture", "--out", str(tmp_path), *SMALL]
    assert main(["bench", "ttft", *urls(servers), *options]) == 1
    captured = capfd.readouterr()
    assert "not the words of the server without kvcodec: exact at as is, repeat 1: at character 0" in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ttft.csv", "ttft.json"]


def test_other_words_of_an_unknown_or_lossy_tier_are_counted(servers, capfd):
    servers[0].answer = lambda prompt: "something else"
    assert main(["bench", "ttft", *urls(servers), *SMALL]) == 0
    assert "server (of an unknown tier): 0 of 2 answers" in capfd.readouterr().out


def test_servers_that_can_not_be_compared_are_refused(servers, capfd):
    server, baseline = servers
    assert main(["bench", "ttft", "--server", baseline.url, "--baseline", baseline.url]) == 2
    assert "shows no metrics of kvcodec" in capfd.readouterr().err
    assert main(["bench", "ttft", "--server", server.url, "--baseline", server.url]) == 2
    assert "a baseline is a server without it" in capfd.readouterr().err


def test_sigterm_ends_it(servers, capfd):
    def interrupted(prompt):
        signal.raise_signal(signal.SIGTERM)
        return "too late"

    # A signal comes to the main thread, whichever thread raised it.
    servers[1].answer = interrupted
    before = signal.getsignal(signal.SIGTERM)
    assert main(["bench", "ttft", *urls(servers), *SMALL]) == 130
    assert "interrupted" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def trace(tmp_path):
    writer = tracer(tmp_path / "trace.json")
    fetched(writer, "r1", 100.0)
    fetched(writer, "r2", 200.0)
    computed(writer, "r3", 300.0)
    writer.close()
    return tmp_path / "trace.json"


@pytest.mark.parametrize(("options", "rid"), [([], "r2"), (["--request", "r1"], "r1"), (["--request", "r3"], "r3")])
def test_gantt(trace, capfd, tmp_path, options, rid):
    out = tmp_path / "pictures/request.svg"
    assert main(["bench", "gantt", str(trace), *options, "--out", str(out)]) == 0
    assert f"request {rid}, of 3 in the trace: written to {out}" in capfd.readouterr().out
    words = words_of(out)
    assert f"request {rid}:" in words
    assert ("wire" in words) == (rid != "r3")


def test_gantt_of_a_trace_that_is_cut_off_and_damaged(trace, capfd, tmp_path):
    lines = trace.read_text().splitlines()
    lines[5] = lines[5][:10]
    trace.write_text("\n".join(lines)[:-30])
    assert main(["bench", "gantt", str(trace), "--out", str(tmp_path / "g.svg")]) == 0
    assert "1 lines of" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{trace}", "--request", "r9", "--out", "{dir}/g.svg"], "no request 'r9'; its newest are: r1, r2, r3"),
        (["{dir}/nothing.json", "--out", "{dir}/g.svg"], "can't read"),
        (["{trace}", "--out", "{dir}/g.gif"], "a picture is .svg or .png"),
        (["{trace}", "--out", "{trace}/g.svg"], "can't write to"),
    ],
)
def test_gantt_refuses_in_a_sentence(trace, capfd, tmp_path, arguments, words):
    given = [argument.format(trace=trace, dir=tmp_path) for argument in arguments]
    assert main(["bench", "gantt", *given]) == 2
    err = capfd.readouterr().err
    assert err.startswith("kvcodec: ")
    assert words in err


def test_gantt_of_a_foreign_file(capfd, tmp_path):
    (tmp_path / "other.json").write_text('{"model": "llama"}')
    assert main(["bench", "gantt", str(tmp_path / "other.json"), "--out", str(tmp_path / "g.svg")]) == 2
    assert "is no trace" in capfd.readouterr().err
