"""What the demo says; that it runs is a test of the whole, with real servers."""

import dataclasses
import json

import pytest
from rich.console import Console

from sglang_kvcodec.cli.demo import Turn, parse_args, report_words, turn_table, write_json
from sglang_kvcodec.testing.sglang_client import CachedTokens

FIRST = Turn(1, "server-A", 2004, CachedTokens(), 0.5, 0, 0, "def f", 0.4, "def f")
SECOND = Turn(2, "server-B", 2272, CachedTokens(64, 0, 1984), 0.25, 4 << 20, 10 << 20, "return x", 2.0, "return x")


def test_equal_words():
    said = []
    assert report_words([FIRST, SECOND], said.append)
    assert said == ["all 2 answers are word for word those of the server without kvcodec"]


def test_the_first_different_word_is_told():
    said = []
    assert not report_words([FIRST, dataclasses.replace(SECOND, plain_text="return y")], said.append)
    assert said == ["turn 2 differs from the server without kvcodec: at character 7: 'return x' against 'return y'"]


def test_the_table_fits_a_narrow_terminal():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(turn_table([FIRST, SECOND]))
    console.file.close()
    text = console.export_text()
    row = next(line for line in text.splitlines() if line.split("│")[1:2] == ["   2"])
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        *("2", "B", "2272", "64", "0", "1984", "0.25 s", "4.00", "2.50x", "2.00 s"),
    ]
    assert "…" not in text


def test_the_report_holds_what_a_number_needs(tmp_path):
    path = tmp_path / "demo.json"
    write_json(path, parse_args([]), [FIRST, SECOND])
    report = json.loads(path.read_text())
    assert set(report) == {"date", "command", "machine", "versions", "configuration", "turns"}
    assert {"cpu", "cores", "gpus"} == set(report["machine"])
    assert report["versions"]["sglang"] == "0.5.23"
    assert [turn["compression_ratio"] for turn in report["turns"]] == [None, 2.5]


@pytest.mark.parametrize("arguments", [["--turns", "0"], ["--profile", "best"], ["--prompt-tokens", "-5"], ["extra"]])
def test_a_bad_argument_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_args(arguments)
    assert "error" in capsys.readouterr().err
