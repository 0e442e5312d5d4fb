"""TLS between real peers and their clients: who is trusted, who is not, and that nothing ever goes on in plaintext."""

import contextlib
import datetime
import json
import re
import shutil
import socket
import threading
import time

import grpc
import pytest
from cryptography import x509
from peer_kit import HASHES, NAMESPACE, PAGES, PATIENT, fetch_all, metrics_of
from pki_kit import DAY, Authority

from sglang_kvcodec import metrics
from sglang_kvcodec.cli.main import main
from sglang_kvcodec.config import Access
from sglang_kvcodec.errors import ConfigurationError, PeerUnavailableError, PeerUntrustedError
from sglang_kvcodec.format.exchange import PutOutcome
from sglang_kvcodec.rpc.certificates import ServerCertificates
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.rpc.connect import connect as connect_peers
from sglang_kvcodec.testing.peer import PeerProcess

STARTED_METRICS = ("--metrics-port", "0", "--log-level", "error")


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def serve(authority):
    """Starts peers by TLS; ``serve(certificate, key, *arguments)``."""
    with contextlib.ExitStack() as stack:

        def start(certificate, key, *arguments):
            tls = ["--tls-cert", str(certificate), "--tls-key", str(key), *STARTED_METRICS]
            return stack.enter_context(PeerProcess(arguments=[*tls, *map(str, arguments)]))

        yield start


@pytest.fixture
def client_of():
    """Makes clients and closes them after the test."""
    with contextlib.ExitStack() as stack:

        def make(remote, timeouts=PATIENT, **access):
            client = GrpcPeer(remote, timeouts, access=Access(**{key: str(path) for key, path in access.items()}))
            stack.callback(client.close)
            return client

        yield make


def refused(client):
    """The sentence of the error with which every call of a client that gets no connection ends; it is counted."""
    before = metrics.PEER_ERRORS.labels("lookup", "peer_untrusted")._value.get()
    with pytest.raises(PeerUntrustedError) as caught:
        client.lookup(NAMESPACE, HASHES)
    assert metrics.PEER_ERRORS.labels("lookup", "peer_untrusted")._value.get() == before + 1
    with pytest.raises(PeerUntrustedError):
        list(client.fetch(NAMESPACE, HASHES))
    with pytest.raises(PeerUntrustedError):
        client.put(NAMESPACE, PAGES)
    return str(caught.value)


def test_pages_go_by_tls(authority, serve, client_of):
    process = serve(*authority.issue("peer"))
    assert process.remote.startswith("grpcs://")
    client = client_of(process.remote, tls_ca=authority.file)
    assert [result.outcome for result in client.put(NAMESPACE, PAGES)] == [PutOutcome.STORED] * len(PAGES)
    assert fetch_all(client) == [data for _, data in PAGES]
    with contextlib.closing(connect_peers(process.remote, PATIENT, 2, Access(tls_ca=str(authority.file)))) as one:
        assert one.lookup(NAMESPACE, HASHES).covered_pages == len(PAGES)


def recorded(port, use):
    """What a client sends to a peer on loopback while ``use`` is called with the port of a relay to it."""
    sent = []

    def pump(source, target, keep):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if keep:
                    sent.append(data)
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:

        def relay():
            with contextlib.suppress(OSError):
                client = stack.enter_context(server.accept()[0])
                peer = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                threading.Thread(target=pump, args=(client, peer, True), daemon=True).start()
                pump(peer, client, False)

        threading.Thread(target=relay, daemon=True).start()
        use(server.getsockname()[1])
    return b"".join(sent)


def test_what_was_recorded_can_not_be_played_again(authority, serve, client_of):
    process = serve(*authority.issue("peer"))
    client = client_of(process.remote, tls_ca=authority.file)
    port = int(process.remote.rpartition(":")[2])

    def put(relay_port):
        relayed = GrpcPeer(f"grpcs://127.0.0.1:{relay_port}", PATIENT, access=Access(tls_ca=str(authority.file)))
        with contextlib.closing(relayed):
            assert [result.outcome for result in relayed.put(NAMESPACE, PAGES)] == [PutOutcome.STORED] * len(PAGES)

    sent = recorded(port, put)
    assert len(sent) > sum(len(data) for _, data in PAGES)
    client.delete(NAMESPACE, HASHES)
    assert client.stat().objects == 0
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(sent)
        with contextlib.suppress(OSError):
            # The peer's greeting, then an end: it has another key for every connection.
            while connection.recv(1 << 16):
                pass
    assert client.stat().objects == 0
    assert [result.outcome for result in client.put(NAMESPACE, PAGES)] == [PutOutcome.STORED] * len(PAGES)


def test_an_expired_certificate_is_not_trusted(authority, serve, client_of):
    process = serve(*authority.issue("old", starts=-2 * DAY, ends=-datetime.timedelta(minutes=1)))
    assert "expired" in refused(client_of(process.remote, tls_ca=authority.file))


def test_a_certificate_of_another_authority_is_not_trusted(tmp_path, authority, serve, client_of):
    process = serve(*authority.issue("peer"))
    other = Authority(tmp_path, "other")
    assert "CERTIFICATE_VERIFY_FAILED" in refused(client_of(process.remote, tls_ca=other.file))
    # Nor is it by the system's authorities.
    refused(client_of(process.remote))
    assert client_of(process.remote, tls_ca=authority.file).stat().objects == 0


def test_a_certificate_of_another_host_is_not_trusted(authority, serve, client_of):
    process = serve(*authority.issue("peer", address="127.0.0.2"))
    refused(client_of(process.remote, tls_ca=authority.file))


def test_neither_side_falls_back_to_plaintext(authority, serve, client_of):
    secured = serve(*authority.issue("peer"))
    with pytest.raises(PeerUnavailableError):
        client_of(f"grpc://{secured.address}").lookup(NAMESPACE, HASHES)
    with PeerProcess(arguments=STARTED_METRICS) as plain, pytest.raises(PeerUnavailableError):
        client_of(f"grpcs://{plain.address}", tls_ca=authority.file).lookup(NAMESPACE, HASHES)
    assert 'method="Lookup"' not in metrics_of(secured)


def test_clients_are_known_by_their_certificates(tmp_path, authority, serve, client_of):
    clients = Authority(tmp_path, "clients")
    process = serve(*authority.issue("peer"), "--tls-client-ca", clients.file)
    certificate, key = clients.issue("server-a")
    known = client_of(process.remote, tls_ca=authority.file, tls_cert=certificate, tls_key=key)
    known.put(NAMESPACE, PAGES)
    without = client_of(process.remote, tls_ca=authority.file)
    stranger_files = dict(zip(("tls_cert", "tls_key"), authority.issue("stranger"), strict=True))
    stranger = client_of(process.remote, tls_ca=authority.file, **stranger_files)
    old_files = dict(zip(("tls_cert", "tls_key"), clients.issue("old", -2 * DAY, -DAY), strict=True))
    old = client_of(process.remote, tls_ca=authority.file, **old_files)
    for each in (without, stranger, old):
        # With TLS 1.3 the client hears of it after its own side of the handshake, maybe as a connection that is closed.
        with pytest.raises(PeerUnavailableError):
            each.lookup(NAMESPACE, HASHES)
    assert fetch_all(known) == [data for _, data in PAGES]


def test_a_certificate_is_renewed_under_a_running_peer(tmp_path, authority, serve, client_of):
    certificate, key = authority.issue("peer")
    process = serve(certificate, key)
    first = client_of(process.remote, tls_ca=authority.file)
    first.put(NAMESPACE, PAGES)
    other = Authority(tmp_path, "other")
    new_certificate, new_key = other.issue("new")
    certificate.write_bytes(b"not a certificate")
    assert client_of(process.remote, tls_ca=authority.file).lookup(NAMESPACE, HASHES).covered_pages == len(PAGES)
    assert 'kvcodec_peer_certificate_reloads_total{outcome="failed"} 1.0' in metrics_of(process)
    shutil.copy(new_key, key)
    shutil.copy(new_certificate, certificate)
    assert client_of(process.remote, tls_ca=other.file).lookup(NAMESPACE, HASHES).covered_pages == len(PAGES)
    refused(client_of(process.remote, tls_ca=authority.file))
    # A connection that is open goes on.
    assert fetch_all(first) == [data for _, data in PAGES]
    assert 'kvcodec_peer_certificate_reloads_total{outcome="ok"} 1.0' in metrics_of(process)


def expiry_s(process):
    """When the peer says that its certificate expires, in seconds of Unix time."""
    (line,) = re.findall(
        r"^kvcodec_peer_certificate_expiry_timestamp_seconds (\S+)$", metrics_of(process), re.MULTILINE
    )
    return float(line)


def said_in(certificate):
    return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc.timestamp()


@pytest.mark.parametrize("notice", ["the signal", "by itself"])
def test_when_a_certificate_expires_is_told_at_start_and_after_a_renewal(tmp_path, authority, serve, client_of, notice):
    """Also while nobody connects; and what was noticed before a client connects is what the client then sees."""
    certificate, key = authority.issue("peer")
    process = serve(certificate, key)
    before_s = said_in(certificate)
    assert expiry_s(process) == before_s
    other = Authority(tmp_path, "other")
    renewed, renewed_key = other.issue("new", ends=30 * DAY)
    shutil.copy(renewed_key, key)
    shutil.copy(renewed, certificate)
    if notice == "the signal":
        process.hang_up()
    while expiry_s(process) == before_s:
        time.sleep(0.1)
    assert expiry_s(process) == said_in(renewed)
    assert client_of(process.remote, tls_ca=other.file).lookup(NAMESPACE, HASHES).covered_pages == 0
    refused(client_of(process.remote, tls_ca=authority.file))


def test_a_peer_without_tls_tells_no_expiry():
    with PeerProcess(arguments=STARTED_METRICS) as process:
        assert expiry_s(process) == 0


def test_a_client_takes_renewed_certificates_from_its_files(tmp_path, authority, serve, client_of):
    clients = Authority(tmp_path, "clients")
    process = serve(*authority.issue("peer"), "--tls-client-ca", clients.file)
    certificate, key = clients.issue("server-a", -2 * DAY, -DAY)
    client = client_of(process.remote, tls_ca=authority.file, tls_cert=certificate, tls_key=key)
    with pytest.raises(PeerUnavailableError):
        client.lookup(NAMESPACE, HASHES)
    for renew in (lambda: certificate.write_text("half"), lambda: clients.issue("server-a")):
        renew()
        with pytest.raises(PeerUnavailableError):
            client.lookup(NAMESPACE, HASHES)
    assert client.lookup(NAMESPACE, HASHES).covered_pages == 0
    client.put(NAMESPACE, PAGES)
    # As soon as there is no connection, the next renewal counts as well.
    clients.issue("server-a")
    process.terminate()
    with pytest.raises(PeerUnavailableError):
        client.lookup(NAMESPACE, HASHES)
    process.restart()
    client.wait_until_ready(60)
    assert client.lookup(NAMESPACE, HASHES).covered_pages == 0


def test_connections_that_never_shake_hands_are_closed(authority, serve, client_of):
    process = serve(*authority.issue("peer"))
    host, _, port = process.address.rpartition(":")
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection((host, int(port)), timeout=60)) for _ in range(50)]
        assert client_of(process.remote, tls_ca=authority.file).stat().objects == 0
        for connection in idle:
            assert connection.recv(1) == b""


def test_commands_go_by_tls(authority, serve, capfd):
    process = serve(*authority.issue("peer"))
    command = ["calibrations", "ls", "--json", "--remote", process.remote]
    assert main([*command, "--tls-ca", str(authority.file)]) == 0
    assert json.loads(capfd.readouterr().out) == []
    assert main(command) == 2
    assert "CERTIFICATE_VERIFY_FAILED" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tls-cert", "{crt}"], "go together"),
        (["--tls-client-ca", "{ca}"], "--tls-client-ca needs"),
        (["--tls-cert", "{crt}", "--tls-key", "{dir}/none"], "none: No such file"),
        (["--tls-cert", "{ca}", "--tls-key", "{key}"], "no certificate and key"),
        (["--tls-cert", "{crt}", "--tls-key", "{key}", "--tls-client-ca", "{key}"], "no certificates of a CA"),
        (["--listen", "0.0.0.0:0", "--tls-cert", "{crt}", "--tls-key", "{key}"], "without authentication"),
    ],
)
def test_what_a_peer_can_not_serve_with_is_one_sentence(tmp_path, authority, capfd, arguments, words):
    certificate, key = authority.issue("peer")
    names = {"crt": certificate, "key": key, "ca": authority.file, "dir": tmp_path}
    filled = [argument.format(**names) for argument in arguments]
    assert main(["serve", "--store", "memory:", *filled]) == 2
    assert words in capfd.readouterr().err.splitlines()[-1]


def test_beyond_this_machine_with_tls_and_client_certificates_needs_no_flag(authority, capfd):
    certificate, key = authority.issue("peer")
    tls = ["--tls-cert", str(certificate), "--tls-key", str(key), "--tls-client-ca", str(authority.file)]
    # An address that this machine does not have: it got as far as listening.
    assert main(["serve", "--store", "memory:", "--listen", "192.0.2.1:1", *tls]) == 2
    assert "can't listen on 192.0.2.1:1" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("access", "words"),
    [
        ({"tls_ca": "/none"}, "can't read /none"),
        ({"tls_cert": "/none"}, "needs its key"),
        ({"tls_cert": "/none", "tls_key": "/none"}, "no certificate and key"),
        ({"token_file": "/none"}, "can't read /none"),
    ],
)
def test_what_a_client_can_not_show_is_one_sentence(access, words):
    with pytest.raises(ConfigurationError, match=words):
        GrpcPeer("grpcs://127.0.0.1:1", access=Access(**access))


def test_a_key_that_is_encrypted_is_refused_without_a_question(tmp_path, authority):
    from cryptography.hazmat.primitives import serialization

    certificate, key = authority.issue("peer")
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    key.write_bytes(
        loaded.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption),
    )
    with pytest.raises(ConfigurationError, match="no certificate and key"):
        ServerCertificates(certificate, key)


def test_plaintext_channels_take_no_tls_settings():
    with pytest.raises(ConfigurationError, match="grpcs"):
        GrpcPeer("grpc://127.0.0.1:1", access=Access(tls_ca="/none"))


def test_health_is_open_but_by_tls(authority, serve):
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    process = serve(*authority.issue("peer"))
    credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
    with grpc.secure_channel(process.address, credentials) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
