"""The command itself: what it prints, what it refuses, what it needs."""

import subprocess
import sys

import pytest
from pki_kit import Authority

from sglang_kvcodec import __version__
from sglang_kvcodec.cli.main import main
from sglang_kvcodec.cli.serve_security import check_listen, check_metrics
from sglang_kvcodec.config import parse_bits_per_s
from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.rpc.server import PeerSecurity


def test_version_and_help(capsys):
    for argument in ("--version", "--help"):
        with pytest.raises(SystemExit) as caught:
            main([argument])
        assert caught.value.code == 0
    out = capsys.readouterr().out
    assert f"kvcodec {__version__}" in out
    assert "serve" in out


SERVE = ["serve", "--listen", "127.0.0.1:0"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*SERVE, "--store", "floppy:A"], "unknown storage engine"),
        ([*SERVE, "--store", "memory:", "--capacity", "much"], "not a size"),
        ([*SERVE, "--store", "memory:", "--calibration-capacity", "much"], "not a size"),
        ([*SERVE, "--store", "memory:", "--calibration-capacity", "0"], "calibration capacity"),
        ([*SERVE, "--store", "memory:", "--bandwidth-limit", "fast"], "not a bandwidth"),
        ([*SERVE, "--store", "memory:", "--max-streams", "0"], "--max-streams"),
        (["serve", "--store", "memory:", "--listen", "here"], "HOST:PORT"),
        (["serve", "--store", "memory:", "--listen", "127.0.0.1:99999"], "HOST:PORT"),
        (["serve", "--store", "memory:", "--listen", "0.0.0.0:0"], "--insecure"),
        (["serve", "--store", "memory:", "--listen", "192.0.2.1:1", "--insecure"], "can't listen"),
        ([*SERVE, "--store", "memory:", "--metrics-port", "99999"], "can't serve metrics"),
        # What --insecure says of the peer holds for its metrics.
        (
            ["serve", "--store", "memory:", "--listen", "192.0.2.1:1", "--metrics-port", "0", "--insecure"],
            "can't serve metrics on 192.0.2.1",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(capfd, arguments, words):
    assert main(arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("kvcodec: ")
    assert words in last


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.8.0.1:1", "localhost:65535", "[::1]:7440"])
def test_loopback_needs_no_flag(listen):
    assert check_listen(listen, insecure=False, security=PeerSecurity()) == listen.rpartition(":")[0]


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "example.org:1", "127.0.0.1.example.org:1"])
def test_beyond_this_machine_needs_a_flag_and_warns(listen, caplog):
    with pytest.raises(ConfigurationError, match="--insecure"):
        check_listen(listen, insecure=False, security=PeerSecurity())
    assert check_listen(listen, insecure=True, security=PeerSecurity()) == listen.rpartition(":")[0]
    assert "plaintext" in caplog.text


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "example.org"])
def test_metrics_beyond_this_machine_need_a_flag_and_warn(host, caplog):
    with pytest.raises(ConfigurationError, match="add --metrics-insecure"):
        check_metrics(0, host, insecure=False)
    check_metrics(None, host, insecure=False)
    check_metrics(0, "127.0.0.1", insecure=False)
    assert caplog.text == ""
    check_metrics(0, host, insecure=True)
    assert f"the metrics port on {host} is in plaintext without authentication" in caplog.text


def test_a_secured_peer_opens_its_metrics_to_other_machines_with_a_flag_alone(tmp_path, capfd):
    authority = Authority(tmp_path)
    certificate, key = map(str, authority.issue("peer"))
    tls = ["--tls-cert", certificate, "--tls-key", key, "--tls-client-ca", str(authority.file)]
    # An address that this machine does not have: where it may listen, it can't.
    command = ["serve", "--store", "memory:", "--listen", "192.0.2.1:1", "--metrics-port", "0", *tls]
    assert main(command) == 2
    (refusal,) = capfd.readouterr().err.splitlines()
    assert refusal.startswith("kvcodec: the metrics port on 192.0.2.1 is open to other machines")
    assert main([*command, "--metrics-insecure"]) == 2
    warning, refusal = capfd.readouterr().err.splitlines()
    assert "whoever reaches it reads them" in warning
    assert refusal.startswith("kvcodec: can't serve metrics on 192.0.2.1")


@pytest.mark.parametrize(("text", "bits"), [("1Gbps", 10**9), ("2.5 mbps", 2_500_000), ("9600bps", 9600)])
def test_bandwidths(text, bits):
    assert parse_bits_per_s(text) == bits


@pytest.mark.parametrize("text", ["", "0Gbps", "1GB", "-1Mbps", "1Gibps"])
def test_no_bandwidths(text):
    with pytest.raises(ConfigurationError):
        parse_bits_per_s(text)


def test_a_peer_needs_neither_torch_nor_sglang_nor_video():
    script = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "sglang", "av", "triton"):
            raise ImportError(f"{name} is not on this machine")
sys.meta_path.insert(0, Blocked())
from sglang_kvcodec.cli.main import main
from sglang_kvcodec.storage import open_engine
import sglang_kvcodec.rpc.client
open_engine("memory:", 1000).close()
try:
    main(["serve", "--help"])
except SystemExit as stopped:
    sys.exit(stopped.code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--capacity" in done.stdout
