"""``kvcodec admin`` against real peers."""

import io
import json
import subprocess
import sys

import pytest
from peer_kit import HASHES, NAMESPACE, PAGES, fetch_all, make_page

from sglang_kvcodec.cli.main import main
from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_archive import ArchiveWriter, read_archive
from sglang_kvcodec.storage import open_engine
from sglang_kvcodec.testing.peer import PeerProcess

OTHER = bytes(range(32, 64))
TOTAL_BYTES = sum(len(data) for _, data in PAGES)


@pytest.fixture(scope="module")
def running():
    """A peer that no test leaves changed."""
    with PeerProcess() as process:
        yield process


@pytest.fixture
def filled(running, connect):
    client = connect(running.remote)
    client.put(NAMESPACE, PAGES)
    return running


def admin(*arguments):
    return main(["admin", *map(str, arguments)])


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_stat(filled, capsys):
    assert admin("stat", "--remote", filled.remote, "--json", "--by-namespace") == 0
    (line,) = lines_of(capsys.readouterr().out)
    assert line["peer"] == filled.remote
    assert (line["objects"], line["stored_bytes"], line["engine"]) == (4, TOTAL_BYTES, "memory")
    assert line["namespaces"] == [{"namespace": NAMESPACE.hex(), "objects": 4, "bytes": TOTAL_BYTES}]
    assert admin("stat", "--remote", filled.remote) == 0
    assert f"{TOTAL_BYTES} of 1073741824 (0.1%)" in capsys.readouterr().out


def test_ls(filled, capsys):
    assert admin("ls", "--remote", filled.remote) == 0
    assert f"{NAMESPACE.hex()}  {4:>10}  {TOTAL_BYTES:>14}" in capsys.readouterr().out
    assert admin("ls", "--remote", filled.remote, NAMESPACE.hex(), "--json") == 0
    listed = lines_of(capsys.readouterr().out)
    assert {(line["page"], line["bytes"]) for line in listed} == {
        (page_hash.hex(), len(data)) for page_hash, data in PAGES
    }
    assert admin("ls", "--remote", filled.remote, NAMESPACE.hex()) == 0
    assert all(page_hash.hex() in capsys.readouterr().out for page_hash in HASHES[:1])
    assert admin("ls", "--remote", filled.remote, OTHER.hex(), "--json") == 0
    assert capsys.readouterr().out == ""


def test_verify_and_warm(filled, capsys):
    assert admin("verify", "--remote", filled.remote) == 0
    assert "4 sound, 0 damaged, 0 gone" in capsys.readouterr().out
    assert admin("warm", "--remote", filled.remote, NAMESPACE.hex()) == 0
    assert f"read 4 pages, {TOTAL_BYTES} bytes; the pages are in this peer's memory already" in capsys.readouterr().out


def test_progress_is_shown_on_a_terminal(filled, capsys, monkeypatch):
    # Nothing where there is no terminal.
    assert admin("verify", "--remote", filled.remote) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert admin("verify", "--remote", filled.remote) == 0
    assert "verify: 100%" in capsys.readouterr().err


def test_verify_finds_what_is_damaged(tmp_path, capsys):
    """One changed byte in the payload, one in the head, a cut object, another page's object; 2 of 6 are sound."""
    pages = [make_page(f"verify {index}") for index in range(6)]
    damages = [
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: data[:-1],
        lambda data: pages[5][1],
    ]
    engine = open_engine(f"lmdb:{tmp_path}/store", 1 << 30)
    for number, (page_hash, data) in enumerate(pages):
        engine.put(NAMESPACE + page_hash, damages[number](data) if number < len(damages) else data)
    engine.close()
    with PeerProcess(f"lmdb:{tmp_path}/store", arguments=["--scrub-rate", "0"]) as process:
        assert admin("verify", "--remote", process.remote, NAMESPACE.hex()) == 1
        out = capsys.readouterr().out
        assert "2 sound, 4 damaged, 0 gone" in out
        for number, (page_hash, _) in enumerate(pages):
            assert (f"{page_hash.hex()} is damaged" in out) == (number < len(damages))
        # It only looks, and an export leaves out what it finds.
        assert admin("export", "--remote", process.remote, tmp_path / "file") == 1
        assert "exported 2 pages" in capsys.readouterr().out
        assert admin("warm", "--remote", process.remote) == 0
        assert "read 6 pages" in capsys.readouterr().out


def test_rm(connect, capsys, monkeypatch):
    with PeerProcess() as process:
        client = connect(process.remote)
        client.put(NAMESPACE, PAGES)
        command = ["rm", "--remote", process.remote, NAMESPACE.hex()]
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
        assert admin(*command) == 2
        assert "--yes" in capsys.readouterr().err
        assert admin(*command, HASHES[1].hex(), bytes(32).hex(), "--yes") == 0
        assert "deleted 1 pages" in capsys.readouterr().out
        assert client.lookup(NAMESPACE, HASHES).present == (True, False, True, True)

        class Terminal(io.StringIO):
            def isatty(self):
                return True

        monkeypatch.setattr("sys.stdin", Terminal("\n"))
        assert admin(*command) == 1
        assert client.stat().objects == 3
        monkeypatch.setattr("sys.stdin", Terminal("y\n"))
        assert admin(*command) == 0
        assert client.stat().objects == 0


def test_export_and_import(filled, tmp_path, connect, capsys):
    file = tmp_path / "pages.kvpa"
    assert admin("export", "--remote", filled.remote, file) == 0
    assert f"exported 4 pages, {TOTAL_BYTES} bytes" in capsys.readouterr().out
    assert admin("export", "--remote", filled.remote, file) == 2
    assert "--force" in capsys.readouterr().err
    assert admin("export", "--remote", filled.remote, file, OTHER.hex(), "--force") == 0
    assert "exported 0 pages" in capsys.readouterr().out
    assert admin("export", "--remote", filled.remote, file, NAMESPACE.hex(), "--force") == 0
    assert list(tmp_path.iterdir()) == [file]
    with PeerProcess() as target:
        client = connect(target.remote)
        client.put(NAMESPACE, PAGES[1:2])
        capsys.readouterr()
        assert admin("import", "--remote", target.remote, file) == 0
        assert "stored 3 pages, 1 were there, 0 damaged, 0 found no room" in capsys.readouterr().out
        assert fetch_all(client) == [data for _, data in PAGES]
        assert admin("import", "--remote", target.remote, file) == 0
        assert "stored 0 pages, 4 were there" in capsys.readouterr().out


def test_an_import_takes_what_is_sound_and_nothing_else(tmp_path, connect, capsys):
    """Bytes that changed in the file, an object that was damaged before, another page's object; then it was cut."""
    file = tmp_path / "file"
    with file.open("wb") as stream:
        writer = ArchiveWriter(stream)
        writer.add(PageKey(NAMESPACE, HASHES[0]), PAGES[0][1])
        writer.add(PageKey(NAMESPACE, HASHES[1]), PAGES[1][1][:-1] + b"?")
        writer.add(PageKey(NAMESPACE, HASHES[2]), PAGES[3][1])
        writer.add(PageKey(NAMESPACE, HASHES[3]), PAGES[3][1])
        changed = stream.tell() - 1
        writer.finish()
    data = bytearray(file.read_bytes())
    data[changed] ^= 1
    file.write_bytes(data)
    with PeerProcess() as target:
        client = connect(target.remote)
        assert admin("import", "--remote", target.remote, file) == 1
        assert "stored 1 pages, 0 were there, 3 damaged" in capsys.readouterr().out
        assert client.lookup(NAMESPACE, HASHES).present == (True, False, False, False)
        client.delete(NAMESPACE, HASHES)
        file.write_bytes(data[: len(PAGES[0][1]) + 1000])
        assert admin("import", "--remote", target.remote, file) == 2
        captured = capsys.readouterr()
        assert "stored 1 pages" in captured.out
        assert "the archive ends before its end" in captured.err
        assert client.lookup(NAMESPACE, HASHES).present == (True, False, False, False)


def test_a_page_that_finds_no_room(tmp_path, filled, capsys):
    file = tmp_path / "file"
    assert admin("export", "--remote", filled.remote, file) == 0
    with PeerProcess(capacity="100KB") as target:
        assert admin("import", "--remote", target.remote, file) == 1
        assert "stored 0 pages, 0 were there, 0 damaged, 4 found no room" in capsys.readouterr().out


def test_several_peers(tmp_path, connect, capsys):
    """Copies are spread by an import, seen on each peer, exported once, and deleted from all."""
    file = tmp_path / "file"
    pages = [make_page(f"several {index}", 101) for index in range(300)]
    with PeerProcess() as first, PeerProcess() as second, PeerProcess() as third:
        remote = ",".join([first.remote, second.address, third.address])
        clients = [connect(process.remote) for process in (first, second, third)]
        clients[0].put(NAMESPACE, pages)
        assert admin("export", "--remote", first.remote, file) == 0
        assert admin("import", "--remote", remote, file) == 0
        assert "stored 300 pages" in capsys.readouterr().out
        assert sum(client.stat().objects for client in clients) >= 600
        assert admin("import", "--remote", remote, file) == 0
        assert "stored 0 pages, 300 were there" in capsys.readouterr().out
        assert admin("export", "--remote", remote, file, "--force") == 0
        with file.open("rb") as stream:
            assert sorted(page.key.page_hash for page in read_archive(stream)) == sorted(hash_ for hash_, _ in pages)
        assert admin("ls", "--remote", remote) == 0
        assert capsys.readouterr().out.count(NAMESPACE.hex()) == 3
        assert admin("rm", "--remote", remote, NAMESPACE.hex(), "--yes") == 0
        assert [client.stat().objects for client in clients] == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stat", "--remote", "http://here"], "grpc://HOST:PORT"),
        (["stat", "--remote", "grpc://127.0.0.1:9"], "Stat at 127.0.0.1:9 failed"),
        (["import", "--remote", "grpc://127.0.0.1:9", "/nowhere/at/all"], "can't read"),
        (["export", "--remote", "grpc://127.0.0.1:9", "/nowhere/at/all"], "can't write"),
    ],
)
def test_what_is_wrong_is_one_sentence(capsys, arguments, words):
    assert main(["admin", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("kvcodec: ")
    assert words in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["ls", "abc"], ["rm", "g" * 64], ["import", "file", "--replicas", "0"]])
def test_arguments_that_are_none(capsys, arguments):
    with pytest.raises(SystemExit):
        main(["admin", *arguments, "--remote", "grpc://127.0.0.1:9"])
    assert "error: argument" in capsys.readouterr().err


def test_a_file_that_is_no_archive(filled, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_bytes(b"something else entirely")
    assert admin("import", "--remote", filled.remote, file) == 2
    assert "not an archive" in capsys.readouterr().err
    with file.open("rb") as stream, pytest.raises(FormatError):
        next(read_archive(stream))


def test_a_listing_into_a_pipe_that_closes(filled):
    """``kvcodec admin ls | head`` ends without a traceback."""
    command = [sys.executable, "-m", "sglang_kvcodec.cli.main", "admin", "ls", "--remote", filled.remote]
    script = '"$@" | true; exit "${PIPESTATUS[0]}"'
    done = subprocess.run(["bash", "-c", script, "sh", *command], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
