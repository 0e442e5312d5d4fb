"""The port of the page, without a peer: what it answers, what it refuses, and who can't hold it up."""

import contextlib
import socket
import time
import urllib.parse

import pytest
from cli.pki_kit import Authority
from report_kit import ask, facts_of

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.rpc.admission import Admission
from sglang_kvcodec.rpc.certificates import ServerCertificates
from sglang_kvcodec.status import StatusListener, StatusReport, StatusSite


@pytest.fixture
def serve():
    """Starts pages; ``serve()`` gives the URL of one."""
    with contextlib.ExitStack() as stack:

        def start(told=None, host="127.0.0.1", **options):
            report = StatusReport(facts_of())
            site = StatusSite(told or report.to_dict, Admission(None), host)
            return stack.enter_context(contextlib.closing(StatusListener(f"{host}:0", site, report, **options))).url

        yield start


def test_the_page_and_what_it_is_fed_with(serve):
    url = serve()
    page, report = ask(url), ask(url, "/status.json?")
    assert (page.status, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert (report.status, report.headers["Content-Type"]) == (200, "application/json")
    assert report.told["peer"]["store"] == "memory:"
    for answer in (page, report, ask(url, "/nowhere")):
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Connection"] == "close"


def test_the_page_names_nothing_outside(serve):
    page = ask(serve()).body.decode()
    # SVG's namespace is a name, not an address.
    assert page.replace("http://www.w3.org/2000/svg", "").count("//") == page.count("// ")


@pytest.mark.parametrize("path", ["/index.html", "/status", "/status.json/", "//", "/../../etc/passwd", "/%2e%2e/x"])
def test_other_paths_are_404(serve, path):
    assert ask(serve(), path).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_other_methods_are_405(serve, method):
    answer = ask(serve(), method=method)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


def test_head_has_no_body(serve):
    answer = ask(serve(), method="HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert int(answer.headers["Content-Length"]) > 1000


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:5", 200),
        ("localhost", 200),
        ("[::1]:80", 200),
        ("example.org", 403),
        ("127.0.0.1.example.org:80", 403),
        ("localhost.example.org", 403),
        ("", 403),
    ],
)
def test_a_foreign_name_that_points_to_this_machine_is_refused(serve, host, status):
    assert ask(serve(), "/status.json", Host=host).status == status


def test_what_goes_wrong_is_500_and_the_next_one_is_answered(serve, caplog):
    answers = iter([ZeroDivisionError, dict])

    def told():
        kind = next(answers)
        if kind is not dict:
            raise kind
        return {}

    url = serve(told)
    failed = ask(url, "/status.json")
    assert failed.status == 500
    assert b"ZeroDivision" not in failed.body
    assert "ZeroDivisionError" in caplog.text
    assert ask(url, "/status.json").told == {}


def connect(url):
    parts = urllib.parse.urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=60)


@pytest.mark.parametrize("said", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "], ids=repr)
def test_who_says_too_little_makes_room_for_others(serve, said):
    url = serve(connection_s=0.5, connections=2)
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(connect(url)).sendall(said)
        assert ask(url).status == 200


def test_who_goes_on_saying_little_is_let_go(serve):
    def drip(connection):
        while True:
            connection.sendall(b"X: y\r\n")
            time.sleep(0.05)

    with connect(serve(connection_s=0.5)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            drip(connection)


def test_who_takes_nothing_makes_room_for_others(serve):
    """The answer is larger than what the kernel holds of it, to clients that do not read."""
    told = [{}, *[{"words": "x" * (24 << 20)}] * 2]
    url = serve(lambda: told.pop() if len(told) > 1 else told[0], connection_s=0.5, connections=2)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            client = stack.enter_context(connect(url))
            client.sendall(b"GET /status.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
        assert ask(url, "/status.json").told == {}


def test_who_never_shakes_hands_makes_room_for_others(serve, tmp_path):
    authority = Authority(tmp_path)
    url = serve(connection_s=1.0, connections=2, context=ServerCertificates(*authority.issue("peer")).context)
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(connect(url)).sendall(b"\x16\x03\x01")
        assert ask(url, ca=authority.file).status == 200


def test_what_is_no_http_is_refused_without_filling_the_log(serve, caplog):
    url = serve()
    with connect(url) as connection:
        connection.sendall(b"\x16\x03\x01 a TLS handshake\r\n\r\n")
        assert b"400" in connection.recv(1 << 16).split(b"\r\n")[0]
    with connect(url) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n")
        assert b"400" in connection.recv(1 << 16).split(b"\r\n")[0]
    assert ask(url).status == 200
    assert caplog.text == ""


def test_a_port_that_is_taken(serve):
    port = serve().strip("/").rpartition(":")[2]
    with pytest.raises(ConfigurationError, match=f"can't serve a status page on 127.0.0.1:{port}: .*in use"):
        StatusListener(f"127.0.0.1:{port}", None, None)


def test_closing_ends_open_connections():
    report = StatusReport(facts_of())
    listener = StatusListener("127.0.0.1:0", StatusSite(report.to_dict, Admission(None), "127.0.0.1"), report)
    with connect(listener.url) as connection:
        assert ask(listener.url).status == 200
        listener.close()
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            connect(listener.url)
    listener.close()


def test_ipv6(serve):
    assert ask(serve(host="[::1]")).status == 200
