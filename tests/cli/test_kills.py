"""A real peer, killed at random moments during puts and evictions, and what a disk does to a stopped one."""

import time

import pytest
from peer_kit import HASHES, NAMESPACE, PAGES, PATIENT, fetch_all, metrics_of

from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.storage.s3_bucket import S3Address, S3Bucket
from sglang_kvcodec.testing.kills import kill_again_and_again
from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.testing.seaweedfs import SeaweedProcess
from sglang_kvcodec.testing.valkey import ValkeyProcess

CAPACITY_BYTES = 1_000_000


def start(store):
    return PeerProcess(store, str(CAPACITY_BYTES), arguments=("--log-level", "error"))


def test_thirty_kills_lose_nothing_that_was_acknowledged(tmp_path):
    with start(f"lmdb:{tmp_path / 'store'}") as process:
        report = kill_again_and_again(process, CAPACITY_BYTES, kills=30, seed=1)
    assert report.kills == 30
    assert report.evicted > 0


def test_a_peer_on_another_machines_engine_is_killed(tmp_path):
    """What it had begun is cleaned up while others go on; so the counts may be ahead, never the objects."""
    with ValkeyProcess(tmp_path / "valkey") as valkey, start(f"redis://{valkey.address}") as process:
        report = kill_again_and_again(process, CAPACITY_BYTES, kills=10, seed=2, held_bytes_per_kill=60_000)
    assert report.kills == 10
    assert report.evicted > 0


def test_a_peer_on_s3_is_killed(tmp_path, monkeypatch):
    """Without evictions: a bucket knows the order of puts by the second only."""
    with SeaweedProcess(tmp_path / "seaweedfs") as bucket:
        for name, value in bucket.env.items():
            monkeypatch.setenv(name, value)
        with PeerProcess(f"s3://kvcodec?endpoint={bucket.endpoint}", "1GB") as process:
            report = kill_again_and_again(process, 10**9, kills=7, seed=4)
    assert report.kills == 7
    assert report.acknowledged > 0
    assert report.evicted == 0


def test_one_of_the_peers_on_a_bucket_is_killed(tmp_path, monkeypatch):
    """As in Redis; and the bucket itself never holds more than the capacity."""
    with SeaweedProcess(tmp_path / "seaweedfs") as bucket, ValkeyProcess(tmp_path / "valkey") as valkey:
        for name, value in bucket.env.items():
            monkeypatch.setenv(name, value)
        address = f"//kvcodec?endpoint={bucket.endpoint}"
        store = f"s3:{address}&index=redis://{valkey.address}"
        objects = S3Bucket(S3Address.parse(address))
        stored_bytes = []

        def count(report):
            # Nothing is put now.
            stored_bytes.append(sum(found.size_bytes for batch in objects.list("indexed") for found in batch))

        with start(store) as process, start(store) as other:
            report = kill_again_and_again(
                process, CAPACITY_BYTES, kills=10, seed=5, held_bytes_per_kill=60_000, on_kill=count
            )
            client = GrpcPeer(other.remote, PATIENT)
            stat = client.stat()
            client.close()
    assert report.kills == 10
    assert report.evicted > 0
    assert 0 < max(stored_bytes) <= CAPACITY_BYTES
    assert 0 < stat.stored_bytes <= stored_bytes[-1]
    assert stat.evicted_objects > 0


def test_the_check_finds_what_is_lost(tmp_path):
    """With an engine that keeps nothing it must fail."""
    with start("memory:") as process, pytest.raises(AssertionError, match="acknowledged and is lost"):
        kill_again_and_again(process, CAPACITY_BYTES, kills=10, seed=3)


def test_damage_on_the_disk_is_found_by_the_scrub(tmp_path):
    arguments = ("--scrub-rate", "1GB", "--metrics-port", "0")
    with PeerProcess(f"lmdb:{tmp_path / 'store'}", arguments=arguments) as process:
        client = GrpcPeer(process.remote, PATIENT)
        client.put(NAMESPACE, PAGES)
        process.kill()
        file = tmp_path / "store" / "data.mdb"
        data = bytearray(file.read_bytes())
        for _, page in PAGES[1:3]:
            # The end of the payload, of every copy that the file may still hold.
            at = data.find(page[-1000:])
            assert at > 0
            while at > 0:
                data[at + 500] ^= 1
                at = data.find(page[-1000:])
        file.write_bytes(data)
        process.restart()
        deadline = time.monotonic() + 60
        while "kvcodec_store_scrub_passes_total 1.0" not in metrics_of(process):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert client.lookup(NAMESPACE, HASHES).present == (True, False, False, True)
        assert 'kvcodec_store_damaged_total{reason="checksum"} 2.0' in metrics_of(process)
        assert fetch_all(client, (HASHES[0], HASHES[3])) == [PAGES[0][1], PAGES[3][1]]
        client.close()
