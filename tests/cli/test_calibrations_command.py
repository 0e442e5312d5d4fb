"""``kvcodec calibrations`` against a peer in this process."""

import contextlib
import json
import socket
import sys

import pytest

from sglang_kvcodec.cli import calibrations
from sglang_kvcodec.cli.main import main
from sglang_kvcodec.format.digest import artifact_digest
from sglang_kvcodec.storage.artifact_memory import MemoryArtifactStore
from sglang_kvcodec.storage.memory import MemoryEngine
from sglang_kvcodec.testing.artifacts import make_artifact, make_model
from sglang_kvcodec.testing.local_peer import LocalPeer

MODEL = make_model("m")
ARTIFACT = make_artifact("a", 1_000_003)
DIGEST = artifact_digest(ARTIFACT)


@pytest.fixture
def store():
    with contextlib.closing(MemoryArtifactStore(2_000_000)) as store:
        yield store


@pytest.fixture
def remote(store):
    engine = MemoryEngine(1000)
    peer = LocalPeer(engine, artifacts=store)
    yield peer.remote
    peer.stop()
    engine.close()


@pytest.fixture
def run(remote, capsys):
    """Runs a command to its end; status, what it printed, and its complaint."""

    def run_it(command, *arguments):
        status = main(["calibrations", command, "--remote", remote, *map(str, arguments)])
        return status, *capsys.readouterr()

    return run_it


@pytest.fixture
def file(tmp_path):
    return tmp_path / "calibration"


def test_put_get_and_rm(run, store, file, tmp_path):
    file.write_bytes(ARTIFACT)
    assert run("put", MODEL.hex(), file) == (0, f"{DIGEST.hex()}\n", "")
    assert store.current(MODEL) == DIGEST
    second = store.put(MODEL, b"second")
    got = tmp_path / "got"
    assert run("get", MODEL.hex(), got) == (0, f"{second.hex()}\n", "")
    assert got.read_bytes() == b"second"
    assert run("get", "--force", MODEL.hex(), got, "--digest", DIGEST.hex().upper()) == (0, f"{DIGEST.hex()}\n", "")
    assert got.read_bytes() == ARTIFACT
    assert run("rm", MODEL.hex(), second.hex()) == (0, "", "")
    assert store.current(MODEL) == DIGEST
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration", "got"]


def test_ls(run, store):
    assert run("ls") == (0, "no calibrations\n", "")
    assert run("ls", "--json") == (0, "[]\n", "")
    for artifact in (ARTIFACT, b"second"):
        store.put(MODEL, artifact)
    status, out, _ = run("ls")
    lines = out.splitlines()
    assert (status, len(lines)) == (0, 3)
    assert lines[1].split()[:3] == [MODEL.hex(), DIGEST.hex(), "1000003"]
    assert [line.endswith("current") for line in lines] == [False, False, True]
    entries = json.loads(run("ls", "--json")[1])
    assert [set(entry) for entry in entries] == [{"model_digest", "digest", "bytes", "stored_at", "current"}] * 2
    assert [(entry["digest"], entry["bytes"], entry["current"]) for entry in entries] == [
        (DIGEST.hex(), 1_000_003, False),
        (artifact_digest(b"second").hex(), 6, True),
    ]
    assert lines[2].split()[3] == entries[1]["stored_at"]


def complaint(outcome):
    status, out, err = outcome
    assert (status, out) == (2, "")
    assert err.startswith("kvcodec: ")
    assert err.count("\n") == 1
    return err


def test_what_is_not_there(run, file):
    assert f"no calibration for model {MODEL.hex()}" in complaint(run("get", MODEL.hex(), file))
    assert f"no calibration {DIGEST.hex()}" in complaint(run("get", MODEL.hex(), file, "--digest", DIGEST.hex()))
    assert f"no calibration {DIGEST.hex()}" in complaint(run("rm", MODEL.hex(), DIGEST.hex()))
    assert not file.exists()
    assert "No such file" in complaint(run("put", MODEL.hex(), file))


def test_a_file_is_not_overwritten(run, store, file):
    store.put(MODEL, ARTIFACT)
    file.write_text("precious")
    assert "--force" in complaint(run("get", MODEL.hex(), file))
    assert file.read_text() == "precious"


def test_a_place_where_nothing_can_be_written(run, store, tmp_path):
    store.put(MODEL, ARTIFACT)
    assert "No such file or directory" in complaint(run("get", MODEL.hex(), tmp_path / "nowhere" / "file"))


def test_files_that_no_peer_takes(run, file, monkeypatch):
    file.write_bytes(b"")
    assert "1 to" in complaint(run("put", MODEL.hex(), file))
    file.write_bytes(bytes(2_000_001))
    assert "never evicted" in complaint(run("put", MODEL.hex(), file))
    monkeypatch.setattr(calibrations, "MAX_ARTIFACT_BYTES", 100)
    assert "2000001 bytes" in complaint(run("put", MODEL.hex(), file))


@pytest.mark.parametrize("digest", ["", "ab", "g" * 64, "a" * 65, "../" * 21 + "a"])
def test_digests_that_are_none(capsys, file, digest):
    for arguments in (["get", digest, file], ["put", digest, file], ["rm", digest, "a" * 64], ["rm", "a" * 64, digest]):
        with pytest.raises(SystemExit) as caught:
            main(["calibrations", *map(str, arguments), "--remote", "grpc://127.0.0.1:1"])
        assert caught.value.code == 2
        assert "64 hexadecimal digits" in capsys.readouterr().err


def test_nobody_there(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert main(["calibrations", "ls", "--remote", f"grpc://127.0.0.1:{port}"]) == 2
    assert "ListCalibrations at" in capsys.readouterr().err
    assert main(["calibrations", "ls", "--remote", "somewhere"]) == 2
    assert "grpc://HOST:PORT" in capsys.readouterr().err


def test_a_large_one_shows_its_progress_on_a_terminal(run, file, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrations, "_BAR_FROM_BYTES", 1000)
    file.write_bytes(ARTIFACT)
    # Nothing where there is no terminal.
    assert run("put", MODEL.hex(), file)[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, out, err = run("put", MODEL.hex(), file)
    assert (status, out) == (0, f"{DIGEST.hex()}\n")
    assert "put: 100%" in err
    assert "1.00M/1.00M" in err
    assert "get: 100%" in run("get", MODEL.hex(), tmp_path / "got")[2]


def test_several_peers(file, tmp_path, capsys):
    """Each gets it, as each has pages of it; one that goes takes nothing away."""
    file.write_bytes(ARTIFACT)
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(contextlib.closing(MemoryArtifactStore(2_000_000))) for _ in range(2)]
        peers = [LocalPeer(MemoryEngine(1000), artifacts=store) for store in stores]
        for peer in peers:
            stack.callback(peer.stop)
        remote = "grpc://" + ",".join(peer.address for peer in peers)

        def run(command, *arguments):
            status = main(["calibrations", command, "--remote", remote, *map(str, arguments)])
            return status, capsys.readouterr().out

        assert run("put", MODEL.hex(), file) == (0, f"{DIGEST.hex()}\n")
        assert [store.current(MODEL) for store in stores] == [DIGEST, DIGEST]
        assert stores[0].delete(MODEL, DIGEST)
        got = tmp_path / "got"
        assert run("get", MODEL.hex(), got) == (0, f"{DIGEST.hex()}\n")
        assert got.read_bytes() == ARTIFACT
        assert DIGEST.hex() in run("ls")[1]
        assert run("rm", MODEL.hex(), DIGEST.hex())[0] == 0
        assert stores[1].current(MODEL) is None
