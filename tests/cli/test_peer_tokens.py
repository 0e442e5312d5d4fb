"""Tokens, tenants and the limits of one client, at real peers: who may do what, what stays unseen, who is refused."""

import concurrent.futures
import contextlib
import hashlib
import os
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from peer_kit import HASHES, NAMESPACE, PAGES, PATIENT, fetch_all, make_page, metrics_of

from sglang_kvcodec.cli.main import main
from sglang_kvcodec.config import MAX_OBJECT_BYTES, Access
from sglang_kvcodec.errors import ConfigurationError, PeerDeniedError, PeerRejectedError, PeerUnavailableError
from sglang_kvcodec.evaluation.rates import measure_link
from sglang_kvcodec.format.exchange import PutOutcome
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.testing.peer import PeerProcess

SERVICE = "/sglang_kvcodec.rpc.Peer"
MODEL = bytes(32)
ARTIFACT = b"calibration " * 1000
PATIENCE_S = 60


def every_call(client):
    return {
        "Lookup": lambda: client.lookup(NAMESPACE, HASHES),
        "Fetch": lambda: list(client.fetch(NAMESPACE, HASHES)),
        "Put": lambda: client.put(NAMESPACE, PAGES),
        "Delete": lambda: client.delete(NAMESPACE, HASHES),
        "Stat": client.stat,
        "GetCalibration": lambda: client.get_calibration(MODEL),
        "ListCalibrations": client.list_calibrations,
        "PutCalibration": lambda: client.put_calibration(MODEL, ARTIFACT),
        "DeleteCalibration": lambda: client.delete_calibration(MODEL, bytes(32)),
    }


def allowed(client):
    """The calls that the client is not denied."""
    names = set()
    for name, call in every_call(client).items():
        with contextlib.suppress(PeerDeniedError):
            call()
            names.add(name)
    return names


READ = {"Lookup", "Fetch", "GetCalibration", "ListCalibrations"}
WRITE = {"Put", "Delete", "PutCalibration"}


def wait_until(condition):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


# ---- tokens and scopes ----


def test_every_call_asks_for_its_scope(site, tmp_path):
    readers, writers = site.issue("reader", "read"), site.issue("writer", "write")
    admins, all_of_them = site.issue("chief", "admin"), site.issue("all", "read,write,admin")
    expired = site.issue("old", expires_at_s=time.time() - 1)
    wrong = tmp_path / "wrong"
    wrong.write_text("token-of-nobody")
    site.serve()
    assert allowed(site.client()) == set()
    assert site.refused("no_token") == len(READ | WRITE) + 2
    assert allowed(site.client(wrong)) == set()
    assert site.refused("unknown_token") == len(READ | WRITE) + 2
    assert allowed(site.client(expired)) == set()
    assert site.refused("expired_token") == len(READ | WRITE) + 2
    assert allowed(site.client(readers)) == READ | {"Stat"}
    assert allowed(site.client(writers)) == WRITE | {"Stat"}
    assert allowed(site.client(admins)) == {"Stat", "DeleteCalibration"}
    assert allowed(site.client(all_of_them)) == READ | WRITE | {"Stat", "DeleteCalibration"}
    text = metrics_of(site.process)
    assert 'kvcodec_peer_rpcs_total{method="Lookup",status="UNAUTHENTICATED"} 3.0' in text
    assert 'kvcodec_peer_rpcs_total{method="Put",status="PERMISSION_DENIED"}' in text
    assert "token-of" not in text


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", "token-of-a"),),
        (("authorization", "Basic token-of-a"),),
        (("authorization", "Bearer "),),
        (("authorization", "Bearer token-of-a x"),),
        (("authorization", "Bearer token-of-a"), ("authorization", "Bearer token-of-a")),
        (("authorization-bin", b"Bearer token-of-a"),),
        (("authorization", "Bearer " + "a" * 6000),),
    ],
)
def test_what_is_no_token_is_refused(site, metadata):
    site.issue("a")
    process = site.serve()
    with grpc.insecure_channel(process.address) as channel:
        stat = channel.unary_unary(f"{SERVICE}/Stat", None, None)
        with pytest.raises(grpc.RpcError) as caught:
            stat(b"", metadata=metadata, timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert stat(b"", metadata=(("authorization", "bearer token-of-a"),), timeout=PATIENCE_S)


def test_who_is_refused_is_so_before_a_request_is_read(site):
    """Half of a message of 4 MiB, and a Put that never begins: neither is waited for."""
    site.issue("a")
    process = site.serve()
    never = threading.Event()

    def nothing():
        never.wait(PATIENCE_S)
        yield from ()

    with grpc.insecure_channel(process.address) as channel:
        for method in ("Put", "Lookup"):
            call = channel.stream_unary(f"{SERVICE}/{method}", None, None).future(nothing(), timeout=PATIENCE_S)
            assert call.code() is grpc.StatusCode.UNAUTHENTICATED
    never.set()


def test_health_is_open_and_reflection_is_not(site):
    site.issue("a", "read")
    process = site.serve()
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(process.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ServerReflectionInfo(iter([request]), timeout=PATIENCE_S))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", "Bearer token-of-a"),)
        assert list(stub.ServerReflectionInfo(iter([request]), metadata=metadata, timeout=PATIENCE_S))


def test_services_that_nobody_thought_of_are_an_operators(site):
    """What is served one day without a thought of tokens is not open to all for that."""
    for name, fields in (("reader", {}), ("chief", {"tenant": "a"}), ("operator", {})):
        site.issue(name, "read" if name == "reader" else "admin", **fields)
    process = site.serve()
    codes = {}
    with grpc.insecure_channel(process.address) as channel:
        call = channel.unary_unary("/somebody.Else/Anything", None, None)
        for name in ("", "reader", "chief", "operator"):
            metadata = (("authorization", f"Bearer token-of-{name}"),) if name else ()
            codes[name] = call.future(b"", metadata=metadata, timeout=PATIENCE_S).code()
    assert codes == {
        "": grpc.StatusCode.UNAUTHENTICATED,
        "reader": grpc.StatusCode.PERMISSION_DENIED,
        "chief": grpc.StatusCode.PERMISSION_DENIED,
        "operator": grpc.StatusCode.UNIMPLEMENTED,
    }


@pytest.mark.parametrize("by_signal", [False, True])
def test_a_token_that_was_withdrawn_is_refused(site, by_signal):
    old, kept = site.issue("old"), site.issue("kept")
    process = site.serve()
    client = site.client(old)
    client.put(NAMESPACE, PAGES)
    head, *entries = site.file.read_text().split("[[token]]")
    site.file.write_text(head + "".join(f"[[token]]{entry}" for entry in entries if '"old"' not in entry))
    if by_signal:
        process.hang_up()
    wait_until(lambda: 'token_reloads_total{outcome="ok"}' in metrics_of(process))
    # What was recorded of the old token's calls is of no use.
    with pytest.raises(PeerDeniedError, match="does not know the token"):
        client.lookup(NAMESPACE, HASHES)
    assert fetch_all(site.client(kept)) == [data for _, data in PAGES]


def test_a_stream_ends_when_its_token_is_withdrawn(site):
    site.issue("other")
    site.issue("old")
    process = site.serve()
    withdrawn = threading.Event()

    def messages():
        for page_hash, data in (PAGES[0], PAGES[1]):
            begin = pb.PutBegin(namespace_digest=NAMESPACE, page_hash=page_hash, object_bytes=len(data))
            yield pb.PutRequest(begin=begin).SerializeToString()
            yield pb.PutRequest(chunk=data).SerializeToString()
            yield pb.PutRequest(commit=True).SerializeToString()
            withdrawn.wait(PATIENCE_S)

    with grpc.insecure_channel(process.address) as channel:
        put = channel.stream_unary(f"{SERVICE}/Put", None, None)
        call = put.future(messages(), metadata=(("authorization", "Bearer token-of-old"),), timeout=PATIENCE_S)
        wait_until(lambda: 'kvcodec_peer_puts_total{outcome="stored"} 1.0' in metrics_of(process))
        site.file.write_text(site.file.read_text().replace('"old"', '"new"'))
        wait_until(lambda: 'token_reloads_total{outcome="ok"}' in metrics_of(process))
        withdrawn.set()
        assert call.code() is grpc.StatusCode.UNAUTHENTICATED
    assert site.refused("withdrawn_token") == 1


def test_a_file_that_is_broken_leaves_the_tokens_of_before(site):
    token = site.issue("a")
    process = site.serve()
    text = site.file.read_text()
    site.file.write_text(text + "\n[[token]]\nname = 'b'\n")
    wait_until(lambda: 'token_reloads_total{outcome="failed"} 1.0' in metrics_of(process))
    site.client(token).put(NAMESPACE, PAGES)
    site.file.unlink()
    wait_until(lambda: 'token_reloads_total{outcome="failed"} 2.0' in metrics_of(process))
    assert fetch_all(site.client(token)) == [data for _, data in PAGES]
    site.file.write_text(text)
    wait_until(lambda: 'token_reloads_total{outcome="ok"} 1.0' in metrics_of(process))


def test_a_client_takes_a_new_token_from_its_file(site):
    first = site.issue("first")
    process = site.serve()
    client = site.client(first)
    client.put(NAMESPACE, PAGES)
    second = site.issue("second")
    site.file.write_text(site.file.read_text().replace(hashlib.sha256(b"token-of-first").hexdigest(), "0" * 64))
    wait_until(lambda: 'token_reloads_total{outcome="ok"}' in metrics_of(process))
    os.replace(second, first)
    with contextlib.suppress(PeerDeniedError):
        client.lookup(NAMESPACE, HASHES)
    assert fetch_all(client) == [data for _, data in PAGES]


def test_tokens_go_to_other_machines_by_tls_alone(site, capfd):
    token = site.issue("a")
    for remote in ("grpc://192.0.2.1:1", "grpc://127.0.0.1:1,192.0.2.1:1", "grpc://localhost.example.org:1"):
        access = Access(token_file=str(token))
        with pytest.raises(ConfigurationError, match="in plaintext"):
            access.require_fit(remote)
        Access(token_file=str(token), insecure=True).require_fit(remote)
        access.require_fit(remote.replace("grpc:", "grpcs:"))
    command = ["serve", "--store", "memory:", "--listen", "0.0.0.0:0", "--tokens", str(site.file)]
    assert main(command) == 2
    assert "plaintext" in capfd.readouterr().err


# ---- tenants ----


def test_a_tenant_sees_its_own_pages_alone(site, tmp_path):
    mine, also_mine = site.issue("a1", tenant="a"), site.issue("a2", tenant="a")
    theirs, default = site.issue("b1", tenant="b"), site.issue("c")
    site.serve(store=f"lmdb:{tmp_path}/store")
    client, colleague, other, nobodys = (site.client(token) for token in (mine, also_mine, theirs, default))
    client.put(NAMESPACE, PAGES)
    assert fetch_all(colleague) == [data for _, data in PAGES]
    for stranger in (other, nobodys):
        assert stranger.lookup(NAMESPACE, HASHES) == stranger.lookup(NAMESPACE, [bytes(32)] * len(HASHES))
        assert [type(event).__name__ for event in stranger.fetch(NAMESPACE, HASHES)] == ["FetchedMissing"] * len(HASHES)
        assert stranger.delete(NAMESPACE, HASHES) == 0
    assert fetch_all(client) == [data for _, data in PAGES]
    # The same page of another tenant is another object: that it was there already is not told.
    for stranger in (other, nobodys):
        assert [result.outcome for result in stranger.put(NAMESPACE, PAGES)] == [PutOutcome.STORED] * len(PAGES)
    assert [result.outcome for result in colleague.put(NAMESPACE, PAGES)] == [PutOutcome.ALREADY_STORED] * len(PAGES)
    assert other.delete(NAMESPACE, HASHES) == len(HASHES)
    assert fetch_all(client) == fetch_all(nobodys) == [data for _, data in PAGES]


def test_a_tenant_is_not_told_how_much_others_store(site):
    writer, chief = site.issue("a", tenant="a"), site.issue("chief", "admin", tenant="a")
    default, operator = site.issue("default"), site.issue("operator", "admin")
    site.serve()
    site.client(writer).put(NAMESPACE, PAGES)
    for token in (writer, chief, default):
        stat = site.client(token).stat()
        assert (stat.objects, stat.stored_bytes, stat.evicted_objects) == (0, 0, 0)
        assert stat.capacity_bytes > 0
    assert site.client(operator).stat().objects == len(PAGES)


def test_calibrations_are_the_tenants_own(site, tmp_path):
    scopes = "read,write,admin"
    mine, theirs, default = (
        site.issue(name, scopes, **fields)
        for name, fields in (("a", {"tenant": "a"}), ("b", {"tenant": "b"}), ("c", {}))
    )
    process = site.serve(store=f"lmdb:{tmp_path}/store")
    client, *strangers = (site.client(token) for token in (mine, theirs, default))
    digest = client.put_calibration(MODEL, ARTIFACT)
    for stranger in strangers:
        assert stranger.list_calibrations() == []
        assert stranger.get_calibration(MODEL) is None
        assert stranger.get_calibration(MODEL, digest) is None
        assert not stranger.delete_calibration(MODEL, digest)
    strangers[0].put_calibration(MODEL, b"another")
    process.terminate()
    process.restart()
    assert client.get_calibration(MODEL) == ARTIFACT
    assert [entry.digest for entry in client.list_calibrations()] == [digest]
    assert strangers[0].get_calibration(MODEL) == b"another"


def test_what_was_stored_without_tokens_is_the_default_tenants(site, tmp_path):
    store = f"lmdb:{tmp_path}/store"
    with PeerProcess(store) as plain, contextlib.closing(GrpcPeer(plain.remote, PATIENT)) as client:
        client.put(NAMESPACE, PAGES)
        client.put_calibration(MODEL, ARTIFACT)
        plain.terminate()
    default, tenant = site.issue("c"), site.issue("a", tenant="a")
    site.serve(store=store)
    assert fetch_all(site.client(default)) == [data for _, data in PAGES]
    assert site.client(default).get_calibration(MODEL) == ARTIFACT
    assert site.client(tenant).lookup(NAMESPACE, HASHES).covered_pages == 0


def test_tenants_pages_outlive_a_scrub(site, tmp_path):
    token = site.issue("a", tenant="a")
    process = site.serve("--scrub-rate", "1GB", store=f"lmdb:{tmp_path}/store")
    site.client(token).put(NAMESPACE, PAGES)
    process.terminate()
    process.restart()
    wait_until(lambda: "kvcodec_store_scrub_passes_total 1.0" in metrics_of(process))
    assert fetch_all(site.client(token)) == [data for _, data in PAGES]


def test_the_doctor_measures_the_link_to_a_tenants_pages(site):
    token = site.issue("a", tenant="a")
    process = site.serve()
    link = measure_link(process.remote, 0.2, Access(token_file=str(token)))
    assert link.measured_bytes > 1 << 20


# ---- limits of one client ----


def begin_of(page_hash, object_bytes):
    begin = pb.PutBegin(namespace_digest=NAMESPACE, page_hash=page_hash, object_bytes=object_bytes)
    return pb.PutRequest(begin=begin).SerializeToString()


class HeldPuts:
    """Puts that begin an object and say no more."""

    def __init__(self, address, token, count, object_bytes=1 << 20):
        self._channel = grpc.insecure_channel(address)
        self._ending = threading.Event()
        self._object_bytes = object_bytes
        put = self._channel.stream_unary(f"{SERVICE}/Put", None, None)
        metadata = (("authorization", f"Bearer {token}"),)
        self.calls = [put.future(self._messages(), metadata=metadata, timeout=PATIENCE_S) for _ in range(count)]

    def _messages(self):
        yield begin_of(os.urandom(32), self._object_bytes)
        self._ending.wait(PATIENCE_S)

    def close(self):
        self._ending.set()
        self._channel.close()


def test_one_client_over_its_streams_and_another_goes_on(site):
    greedy, modest = site.issue("greedy"), site.issue("modest")
    process = site.serve("--max-streams", 8, "--client-max-streams", 3)
    with contextlib.closing(HeldPuts(process.address, "token-of-greedy", 3)):
        wait_until(lambda: 'kvcodec_peer_streams{method="Put"} 3.0' in metrics_of(process))
        with pytest.raises(PeerRejectedError, match="this client has 3 streams open already"):
            site.client(greedy).put(NAMESPACE, PAGES)
        client = site.client(modest)
        client.put(NAMESPACE, PAGES)
        assert fetch_all(client) == [data for _, data in PAGES]
        # Calls that are no streams are not counted against it.
        assert site.client(greedy).lookup(NAMESPACE, HASHES).covered_pages == len(HASHES)
    wait_until(lambda: 'kvcodec_peer_streams{method="Put"} 0.0' in metrics_of(process))
    assert fetch_all(site.client(greedy)) == [data for _, data in PAGES]
    assert site.refused("client_streams") == 1


def test_one_client_does_not_hold_all_the_memory_for_puts(site):
    site.issue("greedy")
    modest = site.issue("modest")
    process = site.serve()
    with contextlib.closing(HeldPuts(process.address, "token-of-greedy", 3, MAX_OBJECT_BYTES)) as held:
        wait_until(lambda: 'kvcodec_peer_streams{method="Put"} 3.0' in metrics_of(process))
        assert site.client(modest).put(NAMESPACE, PAGES)[0].outcome is PutOutcome.STORED
        done = {call.code() for call in held.calls if call.done()}
        wait_until(lambda: sum(call.done() for call in held.calls) == 2)
        done |= {call.code() for call in held.calls if call.done()}
    assert done == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert site.refused("client_bytes") == 2


def test_one_client_at_its_bandwidth_and_another_goes_on(site):
    """The greedy one would need a minute for what it sends; the other's page comes meanwhile."""
    greedy, modest = site.issue("greedy"), site.issue("modest")
    process = site.serve("--client-bandwidth-limit", "4Mbps")
    large = make_page("large", 5_000_000)
    slow_client = site.client(greedy)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        slow = pool.submit(slow_client.put, NAMESPACE, [large])
        wait_until(lambda: 'kvcodec_peer_streams{method="Put"} 1.0' in metrics_of(process))
        client = site.client(modest)
        client.put(NAMESPACE, PAGES[:1])
        assert fetch_all(client, HASHES[:1]) == [PAGES[0][1]]
        assert not slow.done()
        slow_client.close()
        with pytest.raises(PeerUnavailableError):
            slow.result()


def test_slow_clients_are_ended_and_others_go_on(site):
    site.issue("slow")
    token = site.issue("quick")
    process = site.serve("--idle-timeout", "3")
    client = site.client(token)
    client.put(NAMESPACE, [make_page(f"large {index}", 1_000_000) for index in range(8)])
    client.put(NAMESPACE, PAGES)
    metadata = (("authorization", "Bearer token-of-slow"),)
    ending = threading.Event()

    def nothing():
        ending.wait(PATIENCE_S)
        yield from ()

    hashes = b"".join(make_page(f"large {index}", 1_000_000)[0] for index in range(8))
    request = pb.FetchRequest(namespace_digest=NAMESPACE, page_hashes=hashes).SerializeToString()
    with (
        contextlib.closing(HeldPuts(process.address, "token-of-slow", 4)) as held,
        grpc.insecure_channel(process.address) as channel,
    ):
        lookup = channel.stream_unary(f"{SERVICE}/Lookup", None, None)
        waiting = [lookup.future(nothing(), metadata=metadata, timeout=PATIENCE_S) for _ in range(4)]
        # One that asks for 48 MB and takes none of it.
        fetch = channel.unary_stream(f"{SERVICE}/Fetch", None, None)(request, metadata=metadata, timeout=PATIENCE_S)
        assert fetch_all(client) == [data for _, data in PAGES]
        for call in held.calls + waiting:
            assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "within 3.0 s" in call.details()
        wait_until(lambda: 'kvcodec_peer_streams{method="Fetch"} 0.0' in metrics_of(process))
        fetch.cancel()
        ending.set()
    assert site.refused("slow") == 9
    assert fetch_all(client) == [data for _, data in PAGES]
    assert process.terminate() == 0


def test_what_is_too_large_is_refused_and_others_go_on(site):
    token = site.issue("a")
    process = site.serve()
    client = site.client(token)
    client.put(NAMESPACE, PAGES)
    metadata = (("authorization", "Bearer token-of-a"),)
    with grpc.insecure_channel(process.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        put = channel.stream_unary(f"{SERVICE}/Put", None, None)
        with pytest.raises(grpc.RpcError) as caught:
            put(iter([begin_of(bytes(32), MAX_OBJECT_BYTES + 1)]), metadata=metadata, timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        for method in ("Put", "Lookup", "Stat", "DeleteCalibration"):
            call = channel.stream_unary(f"{SERVICE}/{method}", None, None)
            scope = (("authorization", "Bearer token-of-a"),)
            with pytest.raises(grpc.RpcError) as caught:
                call(iter([bytes(9 << 20)]), metadata=scope, timeout=PATIENCE_S)
            assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.PERMISSION_DENIED)
    assert fetch_all(client) == [data for _, data in PAGES]


# ---- kvcodec token ----


def test_the_command_makes_tokens_that_peers_accept(site, tmp_path, capfd):
    command = ["token", "--tokens", str(site.file)]
    assert main([*command, "server-a", "--tenant", "team"]) == 0
    captured = capfd.readouterr()
    token = captured.out.strip()
    assert token not in captured.err
    assert token not in site.file.read_text()
    assert site.file.stat().st_mode & 0o777 == 0o600
    assert main([*command, "server-b", "--scopes", "read", "--expires-in", "1h"]) == 0
    for name in ("a", "b"):
        (tmp_path / name).write_text(token if name == "a" else capfd.readouterr().out)
    site.serve()
    site.client(tmp_path / "a").put(NAMESPACE, PAGES)
    assert site.client(tmp_path / "b").lookup(NAMESPACE, HASHES).covered_pages == 0
    with pytest.raises(PeerDeniedError):
        site.client(tmp_path / "b").put(NAMESPACE, PAGES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a"], "same name"),
        (["../b"], "name of a token"),
        (["b", "--tenant", "../.."], "name of a tenant"),
        (["b", "--scopes", "everything"], "scopes are some of"),
        (["b", "--expires-in", "tomorrow"], "not a time"),
    ],
)
def test_what_the_command_can_not_make_is_one_sentence(site, capfd, arguments, words):
    site.issue("a")
    before = site.file.read_text()
    assert main(["token", "--tokens", str(site.file), *arguments]) == 2
    assert words in capfd.readouterr().err
    assert site.file.read_text() == before
