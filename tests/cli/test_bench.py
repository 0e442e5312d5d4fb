"""``kvcodec bench``: what it prints and writes, and what it refuses in a sentence."""

import json
import pathlib
import subprocess
import sys

import pytest

from sglang_kvcodec.cli.main import main

TINY = str(pathlib.Path(__file__).parents[1] / "models/tiny-code-lm")
SMALL = ["--model", TINY, "--prefix-tokens", "128", "--documents", "1"]


@pytest.mark.parametrize("bench", ["accuracy", "ratio"])
def test_help(capsys, bench):
    with pytest.raises(SystemExit) as caught:
        main(["bench", bench, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--model PATH" in out
    assert ("--continuation-tokens" in out) == (bench == "accuracy")


def test_accuracy_prints_a_table_and_writes_everything(capfd, tmp_path):
    arguments = ["--continuation-tokens", "32", "--greedy-tokens", "8", "--needles", "1", "--conversations", "0"]
    methods = ["--methods", "bf16,uncalibrated,kivi@2", "--out", str(tmp_path / "new/out")]
    assert main(["bench", "accuracy", *SMALL, *arguments, *methods]) == 0
    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split()[:4] == ["method", "ratio", "bits", "KL"]
    assert [line.split()[0] for line in lines[1:4]] == ["bf16", "uncalibrated", "kivi@2"]
    assert "needle" in captured.out
    assert "6/6" in captured.err
    document = json.loads((tmp_path / "new/out/accuracy.json").read_text())
    assert document["settings"]["kv_heads"] == 2
    assert document["settings"]["documents"] == ["brotli-encode-c"]
    bf16, high, kivi = document["methods"]
    assert bf16["kl_nats"] == 0
    assert 0 < high["kl_nats"] < kivi["kl_nats"]
    for name in ("accuracy.csv", "layers.csv", "accuracy.svg"):
        assert (tmp_path / "new/out" / name).stat().st_size > 100


def test_ratio_of_the_operators_own_text(capfd, tmp_path):
    (tmp_path / "text.py").write_text("def add(left, right):\n    return left + right\n\n\n" * 60)
    options = ["--text", str(tmp_path / "text.py"), "--methods", "exact,zstd", "--page-tokens", "32"]
    assert main(["bench", "ratio", *SMALL, *options, "--out", str(tmp_path)]) == 0
    assert capfd.readouterr().out.splitlines()[1].startswith("exact")
    document = json.loads((tmp_path / "ratio.json").read_text())
    assert document["settings"]["documents"] == ["text.py"]
    assert document["settings"]["page_tokens"] == 32
    assert 1.2 < document["methods"][0]["ratio_to_bf16"] < 2
    assert (tmp_path / "layers.csv").read_text().count("exact,key") == 6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no/such/model"], "there is no model at no/such/model"),
        ([*SMALL, "--methods", "magic"], "unknown method 'magic'"),
        ([*SMALL, "--prefix-tokens", "100"], "multiple of --page-tokens, 64"),
        ([*SMALL, "--page-tokens", "0"], "--page-tokens"),
        ([*SMALL, "--documents", "0"], "--documents must be at least 1"),
        ([*SMALL, "--documents", "9999"], "passages of 128 tokens, not 9999"),
        ([*SMALL, "--threads", "0"], "--threads"),
        ([*SMALL, "--text", "no-such-file"], "can't read no-such-file"),
        ([*SMALL, "--kinds", "code,poems"], "there are code, prose"),
        ([*SMALL, "--kinds", "code", "--text", "any"], "can't be given with --text"),
        ([*SMALL, "--device", "abacus"], "can't use device 'abacus'"),
        ([*SMALL, "--out", TINY + "/config.json"], "can't write to"),
    ],
)
def test_what_is_wrong_is_one_sentence(capfd, arguments, words):
    assert main(["bench", "ratio", *arguments]) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("kvcodec: ")
    assert words in last


@pytest.mark.parametrize(
    ("missing", "words"), [("torch", "torch"), ("transformers", "transformers"), ("matplotlib", "matplotlib")]
)
def test_without_its_libraries_it_says_what_to_install(missing, words, tmp_path):
    script = (
        "import sys; sys.modules[sys.argv[1]] = None\n"
        "from sglang_kvcodec.cli.main import main; sys.exit(main(sys.argv[2:]))"
    )
    command = [sys.executable, "-c", script, missing, "bench", "accuracy", "--model", TINY, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert words in done.stderr
    assert "sglang-kvcodec[bench]" in done.stderr
