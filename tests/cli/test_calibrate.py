import contextlib

import pytest

from sglang_kvcodec.cli.main import main
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.model_files import model_files_digest
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.testing.peer import PeerProcess

MODEL = "tests/models/tiny-code-lm"
SMALL = ["--documents", "16", "--gradient-documents", "2", "--search-documents", "2"]
SMALL += ["--prefix-tokens", "256", "--continuation-tokens", "64", "--threads", "1"]


def test_a_calibration_of_each_rank_is_written_and_stored_and_codes(tmp_path, capfd):
    with PeerProcess() as peer:
        options = ["--model", MODEL, "--remote", peer.remote, "--out", str(tmp_path), "--tp-size", "2"]
        assert main(["calibrate", *options, *SMALL, "--layers-per-block", "1", "--profile", "high"]) == 0
        printed = capfd.readouterr().out
        files = sorted(tmp_path.iterdir())
        assert [file.name for file in files] == [f"calibration-{rank}-of-2.safetensors" for rank in (0, 1)]
        made = [Calibration.from_bytes(file.read_bytes()) for file in files]
        with contextlib.closing(GrpcPeer(peer.remote)) as client:
            for rank, calibration in enumerate(made):
                assert client.get_calibration(calibration.model_digest) == calibration.encoded
                assert calibration.digest.hex() in printed
                assert (calibration.layout.tp_rank, calibration.layout.kv_heads) == (rank, 1)
    assert list(made[0].tiers) == ["high"]
    assert made[0].rope is not None
    expected = made[0].tiers["high"].expected
    assert 0 < expected["divergence_nats"] <= expected["allowed_divergence_nats"]
    bench = ["bench", "accuracy", "--model", MODEL, "--calibration", *map(str, files), "--methods", "fp8,high"]
    small = ["--documents", "2", "--prefix-tokens", "256", "--continuation-tokens", "64", "--threads", "1"]
    none = ["--needles", "0", "--conversations", "0", "--greedy-tokens", "0", "--no-picture"]
    assert main([*bench, *small, *none]) == 0
    rows = {line.split()[0]: float(line.split()[1]) for line in capfd.readouterr().out.splitlines()[1:3]}
    assert rows["high"] > 1.5 * rows["fp8"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", MODEL], "say where"),
        (["--model", MODEL, "--out", "{}", "--profile", "exact"], "tiers"),
        (["--model", MODEL, "--out", "{}", "--prefix-tokens", "100"], "pages of 64"),
        (["--model", MODEL, "--out", "{}", "--tp-size", "3"], "ranks"),
        (["--model", MODEL, "--out", "{}", "--documents", "4"], "too few"),
        (["--model", MODEL, "--out", "{}", "--documents", "1000000"], "passages"),
        (["--model", "nowhere", "--out", "{}"], "no model"),
    ],
)
def test_what_can_not_be_done_is_one_sentence(options, words, tmp_path, capfd):
    assert main(["calibrate", *(option.format(tmp_path) for option in options), "--threads", "1"]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert words in error


def test_models_are_told_apart_by_their_files(tmp_path):
    digests = set()
    for content in (b"a" * 200_000, b"a" * 199_999 + b"b", b"a" * 200_001):
        (tmp_path / "model.safetensors").write_bytes(content)
        digests.add(model_files_digest(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    digests.add(model_files_digest(tmp_path))
    assert len(digests) == 4
    (tmp_path / "notes.txt").write_text("x")
    assert model_files_digest(tmp_path) in digests
