"""``kvcodec serve`` on engines of other machines: killed, restarted, several on one."""

import os
import subprocess
import sys

import pytest
from peer_kit import HASHES, NAMESPACE, PAGES, PATIENT, fetch_all, metrics_of

from sglang_kvcodec.cli.main import main
from sglang_kvcodec.errors import PeerRejectedError
from sglang_kvcodec.format.exchange import PutOutcome
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.testing.seaweedfs import SeaweedProcess
from sglang_kvcodec.testing.valkey import ValkeyProcess, valkey_cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with valkey_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with SeaweedProcess(tmp_path_factory.mktemp("seaweedfs")) as process, pytest.MonkeyPatch.context() as patch:
        for name, value in process.env.items():
            patch.setenv(name, value)
        yield f"s3://kvcodec/peer?endpoint={process.endpoint}"


@pytest.fixture
def store(request):
    if request.param == "s3":
        return request.getfixturevalue("bucket")
    nodes = request.getfixturevalue("cluster")
    return "rediscluster://" + ",".join(node.address for node in nodes)


def put_all(client):
    return [result.outcome for result in client.put(NAMESPACE, PAGES)]


@pytest.mark.parametrize("store", ["s3", "rediscluster"], indirect=True)
def test_what_is_put_outlives_a_kill(store):
    with PeerProcess(store, arguments=("--metrics-port", "0")) as process:
        client = GrpcPeer(process.remote, PATIENT)
        assert put_all(client) == [PutOutcome.STORED] * 4
        assert client.stat().engine == store.partition(":")[0]
        process.kill()
        process.restart()
        assert fetch_all(client) == [data for _, data in PAGES]
        assert put_all(client) == [PutOutcome.ALREADY_STORED] * 4
        assert 'kvcodec_store_call_seconds_count{method="put"} 4.0' in metrics_of(process)
        assert client.delete(NAMESPACE, HASHES) == 4
        # No directory for them was named.
        with pytest.raises(PeerRejectedError):
            client.list_calibrations()
        client.close()


@pytest.mark.parametrize("store", ["s3", "rediscluster"], indirect=True)
def test_an_operator_on_another_machines_store(store, tmp_path, capsys):
    """Listed, read, moved and deleted as on a disk."""
    with PeerProcess(store) as process:
        client = GrpcPeer(process.remote, PATIENT)
        put_all(client)

        def admin(command, *arguments):
            status = main(["admin", command, "--remote", process.remote, *map(str, arguments)])
            return status, capsys.readouterr().out

        status, out = admin("ls", NAMESPACE.hex())
        assert status == 0
        assert all(page_hash.hex() in out for page_hash in HASHES)
        assert f"{NAMESPACE.hex()}  {4:>10}" in admin("ls")[1]
        assert "4 sound, 0 damaged, 0 gone" in admin("verify")[1]
        assert f"keeps nothing of them: it warmed the caches of its {client.stat().engine} store" in admin("warm")[1]
        assert "exported 4 pages" in admin("export", tmp_path / "file")[1]
        assert "deleted 4 pages" in admin("rm", NAMESPACE.hex(), "--yes")[1]
        assert "stored 4 pages, 0 were there" in admin("import", tmp_path / "file")[1]
        assert fetch_all(client) == [data for _, data in PAGES]
        assert client.delete(NAMESPACE, HASHES) == 4
        client.close()


def test_peers_on_one_cluster_are_interchangeable(cluster, tmp_path):
    store = f"rediscluster://{cluster[2].address}?prefix=shared"
    with (
        PeerProcess(store, arguments=("--calibrations", str(tmp_path))) as one,
        PeerProcess(store) as other,
    ):
        writer, reader = GrpcPeer(one.remote, PATIENT), GrpcPeer(other.remote, PATIENT)
        assert put_all(writer) == [PutOutcome.STORED] * 4
        assert fetch_all(reader) == [data for _, data in PAGES]
        one.kill()
        assert put_all(reader) == [PutOutcome.ALREADY_STORED] * 4
        assert reader.delete(NAMESPACE, HASHES[:1]) == 1
        one.restart()
        assert writer.lookup(NAMESPACE, HASHES).present == (False, True, True, True)
        digest = writer.put_calibration(bytes(32), b"calibration")
        assert writer.get_calibration(bytes(32), digest) == b"calibration"
        writer.close()
        reader.close()


def test_peers_on_one_bucket_with_an_index_are_interchangeable(bucket, cluster):
    store = f"{bucket.replace('/peer', '/shared')}&index=rediscluster://{cluster[1].address}"
    with PeerProcess(store, arguments=("--metrics-port", "0")) as one, PeerProcess(store) as other:
        writer, reader = GrpcPeer(one.remote, PATIENT), GrpcPeer(other.remote, PATIENT)
        assert put_all(writer) == [PutOutcome.STORED] * 4
        assert 'kvcodec_store_call_seconds_count{method="put"} 4.0' in metrics_of(one)
        assert fetch_all(reader) == [data for _, data in PAGES]
        one.kill()
        assert put_all(reader) == [PutOutcome.ALREADY_STORED] * 4
        assert reader.delete(NAMESPACE, HASHES[:1]) == 1
        assert put_all(reader) == [PutOutcome.STORED] + [PutOutcome.ALREADY_STORED] * 3
        assert reader.delete(NAMESPACE, HASHES[1:2]) == 1
        one.restart()
        assert writer.lookup(NAMESPACE, HASHES).present == (True, False, True, True)
        assert fetch_all(writer, HASHES[:1]) == [PAGES[0][1]]
        assert writer.stat().engine == "s3"
        assert writer.stat().objects == reader.stat().objects == 3
        writer.close()
        reader.close()


def test_a_password_shows_nowhere(tmp_path, capfd):
    with ValkeyProcess(tmp_path / "valkey", ("--requirepass", "hush-hush")) as valkey:
        with PeerProcess(f"redis://:hush-hush@{valkey.address}") as process:
            assert f"redis://***@{valkey.address}" in process.ready_line
            client = GrpcPeer(process.remote, PATIENT)
            assert put_all(client) == [PutOutcome.STORED] * 4
            client.close()
        command = [sys.executable, "-m", "sglang_kvcodec.cli.main", "serve", "--listen", "127.0.0.1:0"]
        wrong = subprocess.run(
            [*command, "--store", f"redis://{valkey.address}"],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "KVCODEC_STORE_PASSWORD": "hush-wrong"},
        )
    assert wrong.returncode == 2
    assert "hush" not in wrong.stderr + "".join(capfd.readouterr())
    assert wrong.stderr.count("\n") <= 2
