"""The status page of real peers: what it shows of what clients did, and who gets to see it."""

import contextlib
import hashlib
import shutil
import socket
import subprocess
import sys
import time

import pytest
from peer_kit import HASHES, NAMESPACE, PAGES, PATIENT, fetch_all, make_page
from pki_kit import DAY, Authority
from status.report_kit import as_password, ask, page_of

from sglang_kvcodec.cli.main import main
from sglang_kvcodec.config import Access
from sglang_kvcodec.errors import PeerRejectedError
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.testing.peer import PeerProcess

WITH_PAGE = ("--status-page", "127.0.0.1:0")
PATIENCE_S = 60


def client_of(process, access=None):
    return contextlib.closing(GrpcPeer(process.remote, PATIENT, max_message_bytes=1, access=access or Access()))


def told_when(url, condition):
    """What the page is fed with, once that fits the condition; sampled every two seconds, and the store every five."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition(told := ask(url, "/status.json").told):
        assert time.monotonic() < deadline_s, told
        time.sleep(0.1)
    return told


def test_a_peer_has_no_page_unless_asked_for():
    with PeerProcess() as process:
        assert "status=" not in process.ready_line


def test_it_tells_what_clients_did(tmp_path):
    with PeerProcess(f"lmdb:{tmp_path}/store", arguments=WITH_PAGE) as process, client_of(process) as client:
        url = page_of(process)
        first = ask(url, "/status.json").told
        assert first["peer"] | {"uptime_s": 0} == {
            "address": process.address,
            "store": f"lmdb:{tmp_path}/store",
            "version": first["peer"]["version"],
            "state": "ready",
            "uptime_s": 0,
            "certificate_expires_at_s": None,
            "certificate_left_s": None,
        }
        client.put(NAMESPACE, PAGES)
        client.lookup(NAMESPACE, [*HASHES, bytes(32)])
        client.lookup(NAMESPACE, HASHES[:2])
        client.lookup(NAMESPACE, [bytes(32)])
        assert fetch_all(client) == [data for _, data in PAGES]
        size_bytes = sum(len(data) for _, data in PAGES)
        told = told_when(
            url,
            lambda told: (
                told["store"]["objects"] == 4
                and told["pages"]["Fetch"]["recent"]["stored"]
                and sum(told["traffic"]["sent_bytes_per_s"])
                and sum(told["traffic"]["received_bytes_per_s"])
            ),
        )
        assert told["store"]["stored_bytes"] == size_bytes
        assert told["store"]["capacity_bytes"] == 2**30
        assert told["pages"]["Lookup"]["all"] == {"stored": 6, "missing": 2}
        assert told["pages"]["Fetch"]["recent"] == {"stored": 4, "missing": 0}
        traffic = told["traffic"]
        assert (traffic["sent_bytes"], traffic["received_bytes"]) == (size_bytes, size_bytes)
        assert [(prefix["page"], prefix["pages"], prefix["lookups"]) for prefix in told["prefixes"]] == [
            (HASHES[3].hex(), 4, 1),
            (HASHES[1].hex(), 2, 1),
        ]
        assert {prefix["namespace"] for prefix in told["prefixes"]} == {NAMESPACE.hex()}
        (shown,) = told["clients"]["shown"]
        assert (shown["name"], shown["open_calls"], shown["calls"]) == ("ipv4:127.0.0.1", 0, 5)
        assert shown["sent_bytes"] == size_bytes
        assert size_bytes < shown["received_bytes"] < 1.01 * size_bytes
        assert told["errors"] == []


def test_it_tells_errors_by_reason():
    too_large = make_page("too large", part_bytes=200_000)
    with PeerProcess(capacity="1MB", arguments=WITH_PAGE) as process, client_of(process) as client:
        client.put(NAMESPACE, [too_large])
        with pytest.raises(PeerRejectedError):
            client.lookup(bytes(31), HASHES)
        told = told_when(page_of(process), lambda told: len(told["errors"]) == 3)
    assert {(error["what"], error["reason"], error["all"]) for error in told["errors"]} == {
        ("Put", "no_capacity", 1),
        ("store put", "capacity", 1),
        ("Lookup", "INVALID_ARGUMENT", 1),
    }


def test_streams_are_shown_while_they_are_open_and_draining_until_the_end():
    arguments = [*WITH_PAGE, "--drain-s", "60"]
    with PeerProcess(bandwidth_limit="4Mbps", arguments=arguments) as process, client_of(process) as client:
        url = page_of(process)
        client.put(NAMESPACE, PAGES)
        events = client.fetch(NAMESPACE, HASHES)
        next(events)
        told = ask(url, "/status.json").told
        assert told["traffic"]["streams"] == {"Fetch": 1}
        assert told["clients"]["shown"][0]["open_calls"] == 1
        process.signal_stop()
        told_when(url, lambda told: told["peer"]["state"] == "draining")
        for _ in events:
            pass
        assert process.wait() == 0
        with pytest.raises(ConnectionRefusedError):
            ask(url)


def test_a_port_that_is_taken_is_an_error_at_start(capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RuntimeError, match="exit status 2"):
            PeerProcess(arguments=["--status-page", address])
    (last,) = capfd.readouterr().err.splitlines()[-1:]
    assert last.startswith(f"kvcodec: can't serve a status page on {address}: ")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("0.0.0.0:0", "0.0.0.0:0 is open to other machines, plaintext without authentication"),
        ("[::]:0", "or add --insecure"),
        ("7442", "write HOST:PORT"),
        ("localhost:70000", "write HOST:PORT"),
    ],
)
def test_an_address_that_others_reach_needs_consent(capsys, address, words):
    assert main(["serve", "--store", "memory:", "--listen", "127.0.0.1:0", "--status-page", address]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_without_its_library_there_is_a_sentence():
    code = "import sys; sys.modules['aiohttp'] = None\n"
    code += "from sglang_kvcodec.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", "--store", "memory:", "--listen", "127.0.0.1:0", *WITH_PAGE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("kvcodec: --status-page needs the extra [server]: ")


def test_with_consent_it_is_open_to_other_machines():
    with PeerProcess(arguments=["--status-page", "0.0.0.0:0", "--insecure"]) as process:
        port = page_of(process).strip("/").rpartition(":")[2]
        assert ask(f"http://127.0.0.1:{port}/", Host="peer.example.org").status == 200


def test_with_tokens_it_is_for_operators_alone(site):
    tokens = {
        "server": site.issue("server").read_text().strip(),
        "of a tenant": site.issue("tenant", "admin", tenant="team").read_text().strip(),
        "unknown": "nobody's",
    }
    operator = site.issue("operator", "admin").read_text().strip()
    url = page_of(site.serve(*WITH_PAGE))
    asked = ask(url)
    assert asked.status == 401
    assert asked.headers["WWW-Authenticate"].startswith("Basic realm=")
    # An open page would have the browser ask every two seconds.
    silent = ask(url, "/status.json")
    assert (silent.status, silent.headers["WWW-Authenticate"]) == (401, None)
    for name, token in tokens.items():
        for authorization in (f"Bearer {token}", as_password(token), token, "Basic ???", f"Basic {token}"):
            for path in ("/", "/status.json", "/nowhere"):
                assert ask(url, path, Authorization=authorization).status == 401, (name, authorization)
    for authorization in (f"Bearer {operator}", as_password(operator)):
        assert ask(url, Authorization=authorization).status == 200
        told = ask(url, "/status.json", Authorization=authorization).told
        assert told["peer"]["state"] == "ready"
    assert site.refused("scope") > 0
    # One that is withdrawn no longer counts.
    site.file.write_text(site.file.read_text().replace(hashlib.sha256(operator.encode()).hexdigest(), "0" * 64))
    deadline_s = time.monotonic() + PATIENCE_S
    while ask(url, Authorization=as_password(operator)).status == 200:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_names_of_tokens_are_shown_and_pages_of_tenants_by_what_the_store_calls_them(site):
    server = site.issue("server-of-team", tenant="team")
    operator = site.issue("operator", "admin").read_text().strip()
    url = page_of(site.serve(*WITH_PAGE))
    client = site.client(server)
    client.put(NAMESPACE, PAGES)
    client.lookup(NAMESPACE, HASHES)
    told = ask(url, "/status.json", Authorization=f"Bearer {operator}").told
    assert [shown["name"] for shown in told["clients"]["shown"]] == ["server-of-team"]
    (prefix,) = told["prefixes"]
    assert prefix["page"] == HASHES[-1].hex()
    assert prefix["namespace"] != NAMESPACE.hex()


def test_a_peer_with_tls_has_its_page_by_tls_with_the_certificate_that_is_valid_now(tmp_path):
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    certificate, key = authority.issue("peer", ends=10 * DAY)
    arguments = [*WITH_PAGE, "--tls-cert", str(certificate), "--tls-key", str(key)]
    with PeerProcess(arguments=arguments) as process:
        url = page_of(process)
        assert url.startswith("https://")
        left_s = ask(url, "/status.json", ca=authority.file).told["peer"]["certificate_left_s"]
        assert 9 < left_s / 86400 < 10
        with pytest.raises(ConnectionError):
            ask(url.replace("https", "http"))
        renewed, renewed_key = other.issue("new", ends=40 * DAY)
        shutil.copy(renewed_key, key)
        shutil.copy(renewed, certificate)
        left_s = ask(url, "/status.json", ca=other.file).told["peer"]["certificate_left_s"]
        assert 39 < left_s / 86400 < 40
        # What the page took anew, clients of the peer get as well.
        with client_of(process, Access(tls_ca=str(other.file))) as client:
            assert client.stat().objects == 0


def test_a_peer_that_asks_for_certificates_asks_viewers_too(tmp_path):
    authority, clients = Authority(tmp_path), Authority(tmp_path, "clients")
    certificate, key = authority.issue("peer")
    arguments = ["--tls-cert", str(certificate), "--tls-key", str(key), "--tls-client-ca", str(clients.file)]
    with PeerProcess(arguments=[*WITH_PAGE, *arguments]) as process:
        with pytest.raises(OSError, match=r"(?i)certificate required|reset|closed"):
            ask(page_of(process), ca=authority.file)
        mine = clients.issue("operator")
        assert ask(page_of(process), ca=authority.file, certificate=mine).status == 200
