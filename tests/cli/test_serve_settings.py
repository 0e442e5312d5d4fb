"""The settings of ``kvcodec serve``: from flags, environment and file, and anew while it runs."""

import argparse
import json
import logging
import pathlib
import re
import signal
import subprocess
import sys
import time
import tomllib

import pytest
from peer_kit import HASHES, NAMESPACE, PAGES

from sglang_kvcodec.cli import logs
from sglang_kvcodec.cli.main import build_parser, main
from sglang_kvcodec.cli.serve_config import LIVE
from sglang_kvcodec.cli.settings import Settings
from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.testing.peer import PeerProcess

DOCS = pathlib.Path(__file__).parents[2] / "docs/operations.md"


@pytest.fixture
def resolve(tmp_path):
    """Settings of every kind, from a command line, variables and the text of a file."""
    parser = argparse.ArgumentParser()
    settings = Settings(parser, "T_")
    settings.add_argument("--a-size", "--old-name", default="1GB")
    settings.add_argument("--count", type=int)
    settings.add_argument("--seconds", type=float, default=0.5)
    settings.add_argument("--level", choices=("low", "high"), default="low")
    group = settings.add_argument_group("files")
    group.add_argument("--file", type=pathlib.Path)
    group.add_argument("--on", action="store_true")

    def resolve(arguments=(), environment=None, text=None):
        file = None
        if text is not None:
            file = tmp_path / "settings.toml"
            file.write_text(text)
        resolve.resolved = settings.resolve(parser.parse_args(arguments), environment or {}, file)
        return resolve.resolved.values

    resolve.settings = settings
    return resolve


DEFAULTS = {"a_size": "1GB", "count": None, "seconds": 0.5, "level": "low", "file": None, "on": False}


def test_defaults(resolve):
    assert resolve() == DEFAULTS
    assert resolve(environment={"OTHER": "1"}, text="# nothing") == DEFAULTS


def test_every_kind_from_every_place(resolve):
    values = {"a_size": "2GB", "count": 7, "seconds": 2.0, "level": "high", "file": pathlib.Path("x"), "on": True}
    flags = ["--a-size", "2GB", "--count", "7", "--seconds", "2", "--level", "high", "--file", "x", "--on"]
    variables = {"T_A_SIZE": "2GB", "T_COUNT": "7", "T_SECONDS": "2", "T_LEVEL": "high", "T_FILE": "x", "T_ON": "yes"}
    text = 'a-size = "2GB"\ncount = 7\nseconds = 2\nlevel = "high"\nfile = "x"\non = true'
    assert resolve(flags) == values
    assert resolve(environment=variables) == values
    assert resolve(text=text) == values


def test_flags_over_environment_over_file(resolve):
    values = resolve(["--old-name", "3"], {"T_A_SIZE": "2", "T_COUNT": "2"}, 'a-size = "1"\ncount = 1\nseconds = 1')
    assert values == DEFAULTS | {"a_size": "3", "count": 2, "seconds": 1.0}
    assert resolve.resolved.origins["a-size"] == "flag"
    assert resolve.resolved.origins["count"] == "T_COUNT"
    assert resolve.resolved.origins["seconds"].endswith("settings.toml")
    assert resolve.resolved.origins["level"] == "default"


def test_a_variable_turns_off_what_the_file_turns_on(resolve):
    assert resolve(environment={"T_ON": "false"}, text="on = true")["on"] is False


@pytest.mark.parametrize(
    ("environment", "text", "words"),
    [
        ({"T_CUONT": "1"}, None, "no setting has the variable T_CUONT; did you mean T_COUNT?"),
        ({"T_COUNT": "many"}, None, "T_COUNT: not a value for count: 'many'"),
        ({"T_LEVEL": "middle"}, None, "T_LEVEL: level is one of low, high, not 'middle'"),
        ({"T_ON": "perhaps"}, None, "on is true or false"),
        (None, "cuont = 1", "there is no setting 'cuont'; did you mean count?"),
        (None, "a_size = 1", "there is no setting 'a_size'; did you mean a-size?"),
        (None, "old-name = 1", "there is no setting 'old-name'"),
        (None, "[server]\ncount = 1", "there is no setting 'server'"),
        (None, "count = true", "not a value for count: True"),
        (None, "count = [1]", "not a value for count"),
        (None, "count = 1.5", "not a value for count: '1.5'"),
        (None, "on = 1", "on is true or false, not 1"),
        (None, "count = ", "is no TOML"),
    ],
)
def test_what_is_wrong_says_where(resolve, environment, text, words):
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        resolve(environment=environment, text=text)


@pytest.mark.parametrize("value", ['quote " and \\ back', "tab\tnew\nline", "ümlaut 🦊", "\x7f\x01", ""])
def test_what_is_printed_reads_back(resolve, value):
    values = resolve(["--a-size", value, "--count", "3", "--on"])
    text = resolve.settings.to_toml(resolve.resolved)
    assert tomllib.loads(text)["a-size"] == value
    assert resolve(text=text) == values


def serve_flags():
    """What ``kvcodec serve --help`` shows, but for what is no setting."""
    shown = subprocess.run(
        [sys.executable, "-m", "sglang_kvcodec.cli.main", "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout
    return set(re.findall(r"^  (?:-h, )?--([a-z-]+)", shown, re.MULTILINE)) - {"help", "config", "print-config"}


def printed(capsys, *arguments):
    assert main(["serve", "--print-config", *arguments]) == 0
    return capsys.readouterr().out


def test_every_flag_of_serve_is_a_setting(capsys):
    text = printed(capsys)
    assert set(re.findall(r"^(?:# )?([a-z-]+) (?:=|is not set)", text, re.MULTILINE)) == serve_flags()
    assert serve_flags() >= {"listen", "store", "capacity", "insecure", "metrics-port", "metrics-insecure", *LIVE}


def test_every_setting_of_serve_is_documented():
    cells = re.findall(r"^\| (`--[^|]*) \|", DOCS.read_text(), re.MULTILINE)
    assert serve_flags() - set(re.findall(r"`--([a-z-]+)", " ".join(cells))) == set()


def test_print_config(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("KVCODEC_SERVE_CAPACITY", "3GB")
    file = tmp_path / "peer.toml"
    file.write_text('store = "redis://user:secret@example.org"\ncapacity = "2GB"\nttl = 60\n')
    monkeypatch.setenv("KVCODEC_SERVE_CONFIG", str(file))
    text = printed(capsys, "--max-streams", "3")
    assert 'capacity = "3GB"  # KVCODEC_SERVE_CAPACITY' in text
    assert f"ttl = 60.0  # {file}" in text
    assert "max-streams = 3  # flag" in text
    assert "secret" not in text
    assert tomllib.loads(text)["store"] == "redis://***@example.org"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "/nowhere/peer.toml"], "can't read"),
        (["--listen", "127.0.0.1:0"], "needs a store"),
        (["--store", "memory:", "--drain-s", "-1"], "--drain-s"),
        (["--store", "memory:", "--capacity", "0"], "--capacity"),
    ],
)
def test_what_can_not_be_served_is_one_sentence(capsys, arguments, words):
    assert main(["serve", *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("kvcodec: ")
    assert words in last


def test_a_bad_choice_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--log-format", "xml"])
    assert "--log-format" in capsys.readouterr().err


def test_json_lines(capsys):
    logs.set_up("info", "json")
    logger = logging.getLogger("some.module")
    logger.debug("not this")
    logger.info('a "quoted" line\nand another, %s', "ü")
    try:
        raise ValueError("what went wrong")
    except ValueError:
        logger.exception("it failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {"level": "info", "logger": "some.module", "message": 'a "quoted" line\nand another, ü'}
    assert second["level"] == "error"
    assert second["exception"].endswith("ValueError: what went wrong")


def test_a_running_peer_takes_settings_anew(tmp_path, connect, capfd):
    """A smaller capacity evicts, a damaged object is found once the scrub has a rate, a bad file changes nothing."""
    file = tmp_path / "peer.toml"
    store = f"lmdb:{tmp_path}/store"
    size_bytes = len(PAGES[0][1])
    file.write_text(f'store = "{store}"\ncapacity = "1GB"\nscrub-rate = 0\nlog-format = "json"\n')

    def reload(text, words):
        file.write_text(text)
        process.send_signal(signal.SIGHUP)
        deadline_s = time.monotonic() + 60
        while not any(words in message for message in messages):
            assert time.monotonic() < deadline_s, messages
            time.sleep(0.02)
            messages.extend(json.loads(line)["message"] for line in capfd.readouterr().err.splitlines())

    messages = []
    command = [sys.executable, "-m", "sglang_kvcodec.cli.main", "serve", "--listen", "127.0.0.1:0", "--config", file]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            ready = re.match(r"kvcodec peer ready on (\S+) .* capacity=1000000000", process.stdout.readline())
            client = connect(f"grpc://{ready[1]}")
            client.put(NAMESPACE, PAGES)
            client.lookup(NAMESPACE, HASHES)
            same = f'store = "{store}"\nlog-format = "json"\n'
            reload(f'{same}capacity = "{2 * size_bytes + 10}"\nscrub-rate = 0', "capacity is")
            assert client.stat().capacity_bytes == 2 * size_bytes + 10
            assert client.lookup(NAMESPACE, HASHES).present == (True, True, False, False)
            reload('capacity = "much"', "not a size: 'much'")
            reload("capacty = 1", "did you mean capacity?")
            assert client.stat().capacity_bytes == 2 * size_bytes + 10
            reload(f'{same}capacity = "2GB"\nscrub-rate = "1GB"\nmax-streams = 5', "scrubbed 2 objects")
            assert client.stat().capacity_bytes == 2 * 10**9
            assert "max-streams has changed: that takes a start of the peer" in messages
            process.terminate()
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()


def test_the_environment_configures_a_peer(connect, monkeypatch):
    monkeypatch.setenv("KVCODEC_SERVE_MAX_STREAMS", "7")
    monkeypatch.setenv("KVCODEC_SERVE_METRICS_PORT", "0")
    with PeerProcess() as process:
        assert "metrics=127.0.0.1:" in process.ready_line
        assert connect(process.remote).stat().objects == 0
