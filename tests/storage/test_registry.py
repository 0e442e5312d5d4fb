import subprocess
import sys

import pytest

from sglang_kvcodec.errors import ConfigurationError, StorageUnavailableError
from sglang_kvcodec.storage import open_engine, open_store, without_password


def test_memory():
    engine = open_engine("memory:", 1000)
    assert engine.name == "memory"
    assert engine.stat().capacity_bytes == 1000


def test_lmdb_makes_its_directory(tmp_path):
    directory = tmp_path / "deep" / "store: with a colon"
    engine = open_engine(f"lmdb:{directory}", 1000)
    try:
        assert engine.name == "lmdb"
        assert engine.put(b"k" * 64, b"value") is True
        assert (directory / "data.mdb").is_file()
    finally:
        engine.close()


@pytest.mark.parametrize("url", ["", "memory", "http://u:p@host", "/var/lib/kvcodec", "LMDB:/tmp/x"])
def test_unknown_engines_are_refused_with_the_known_ones(url):
    with pytest.raises(ConfigurationError, match=r"memory:, lmdb:DIR") as caught:
        open_engine(url, 1000)
    assert "u:p" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "logged"),
    [
        ("lmdb:/a//b@c", "lmdb:/a//***@c"),
        ("redis://user:secret@host:1/2?prefix=a@b", "redis://***@host:1/2?prefix=a@b"),
        ("redis://host/1", "redis://host/1"),
        ("s3://b/p?index=redis://u:se@/?&cret@h:1/2&region=eu", "s3://b/p?index=redis://***@h:1/2&region=eu"),
        ("s3://b?region=eu&index=rediss%3a%2F%2f:se%2Fcret%40h", "s3://b?region=eu&index=rediss%3a%2F%2f***%40h"),
        ("s3://b?index=redis:%2F%2F:secret@h", "s3://b?index=redis:%2F%2F***@h"),
        ("s3://b?index=:secret%40h", "s3://b?index=***%40h"),
        ("s3://b?index=redis://h", "s3://b?index=redis://h"),
    ],
)
def test_a_password_is_not_logged(url, logged):
    assert without_password(url) == logged


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("lmdb:", "directory"),
        ("memory:4GB", "no location"),
        ("s3://bucket?index=", "index=redis://HOST:PORT"),
        ("s3://bucket?index=lmdb:/x", "index=redis://HOST:PORT"),
        ("s3://bucket?index=redis://", "HOST:PORT"),
        ("s3://bucket?index=redis://h?prefix=%7B", "prefix"),
        ("s3://bucket?%69ndex=redis://h", "no option"),
    ],
)
def test_wrong_locations_are_refused(url, says):
    with pytest.raises(ConfigurationError, match=says):
        open_engine(url, 1000)


@pytest.mark.parametrize("capacity_bytes", [0, -1])
def test_a_store_without_capacity_is_refused(capacity_bytes):
    with pytest.raises(ConfigurationError, match="capacity"):
        open_engine("memory:", capacity_bytes)


@pytest.mark.parametrize(
    ("package", "url", "extra"),
    [
        ("lmdb", "lmdb:{}", "server"),
        ("redis", "redis://127.0.0.1:1", "redis"),
        ("obstore", "s3://bucket", "s3"),
        ("redis", "s3://bucket?index=redis://127.0.0.1:1", "redis,s3"),
    ],
)
def test_a_machine_without_a_package_has_the_memory_engine_and_a_clear_refusal(tmp_path, package, url, extra):
    code = f"""
import sys
sys.modules["{package}"] = None
from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.storage import open_engine
open_engine("memory:", 10).close()
try:
    open_engine("{url.format(tmp_path)}", 10)
except ConfigurationError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert f"pip install sglang-kvcodec[{extra}]" in result.stdout


def test_a_store_has_pages_and_calibrations():
    with open_store("memory:", 1000, 100) as (engine, artifacts):
        assert engine.stat().capacity_bytes == 1000
        assert artifacts.stat().capacity_bytes == 100
    with pytest.raises(StorageUnavailableError):
        engine.stat()
    with pytest.raises(StorageUnavailableError):
        artifacts.stat()


def test_calibrations_lie_inside_the_directory_of_the_engine(tmp_path):
    for _ in range(2):
        with open_store(f"lmdb:{tmp_path / 'store'}", 1000, 100) as (engine, artifacts):
            engine.put(b"k" * 64, b"value")
            digest = artifacts.put(bytes(32), b"artifact")
    assert (tmp_path / "store" / "calibrations" / bytes(32).hex() / digest.hex()).read_bytes() == b"artifact"


def test_pages_may_be_thrown_away_without_the_calibrations(tmp_path):
    url = f"lmdb:{tmp_path / 'store'}"
    with open_store(url, 1000, 100) as (engine, artifacts):
        engine.put(b"k" * 64, b"value")
        digest = artifacts.put(bytes(32), b"artifact")
    for name in ("data.mdb", "lock.mdb"):
        (tmp_path / "store" / name).unlink()
    with open_store(url, 1000, 100) as (engine, artifacts):
        assert engine.stat().objects == 0
        assert artifacts.current(bytes(32)) == digest


def test_calibrations_may_lie_elsewhere(tmp_path):
    directory = tmp_path / "calibrations"
    with open_store("memory:", 1000, 100, str(directory)) as (_, artifacts):
        digest = artifacts.put(bytes(32), b"artifact")
    assert (directory / bytes(32).hex() / digest.hex()).read_bytes() == b"artifact"


def test_a_store_without_room_for_calibrations_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="calibration capacity"), open_store(f"lmdb:{tmp_path}", 1000, 0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_calibrations_that_cannot_be_opened_do_not_keep_the_engine(tmp_path):
    url = f"lmdb:{tmp_path / 'store'}"
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "calibrations").write_text("a file")
    with pytest.raises(ConfigurationError, match="not a directory"), open_store(url, 1000, 100):
        pass
    open_engine(url, 1000).close()
