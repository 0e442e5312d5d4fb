import contextlib
import socket
import threading
import time

import pytest

from sglang_kvcodec.testing.shaped_link import ShapedLink, falls, jitters, stalls, steady

LIMIT_S = 30
DATA = bytes(range(256)) * 2000


class Peer:
    """Answers each line with :data:`DATA`."""

    def __init__(self):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with connection, contextlib.suppress(OSError):
            while connection.recv(100):
                connection.sendall(DATA)

    def close(self):
        # A thread that accepts is not woken by a close alone.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def peer():
    with contextlib.closing(Peer()) as peer:
        yield peer


def connect(link):
    connection = socket.create_connection(("127.0.0.1", int(link.remote.rpartition(":")[2])), LIMIT_S)
    connection.settimeout(LIMIT_S)
    return connection


def received(connection, size):
    data = b""
    while len(data) < size and (more := connection.recv(1 << 16)):
        data += more
    return data


@pytest.mark.parametrize(
    "shape", [steady(1e9), jitters(1e8), falls(1e9, 1000), stalls(1e9, 1000, 0.01)], ids=["s", "j", "f", "st"]
)
def test_what_is_sent_arrives_whole_whatever_the_shape(peer, shape):
    with ShapedLink(peer.address, shape) as link, connect(link) as first, connect(link) as second:
        for connection in (first, second):
            connection.sendall(b"x")
        for connection in (first, second):
            assert received(connection, len(DATA)) == DATA
        assert link.passed_bytes == 2 * len(DATA)


def test_what_is_sent_is_on_its_way_for_a_while(peer):
    with ShapedLink(peer.address, steady(1e9), round_trip_s=0.2) as link, connect(link) as connection:
        started_s = time.monotonic()
        connection.sendall(b"x")
        assert received(connection, len(DATA)) == DATA
        assert time.monotonic() - started_s >= 0.2


def test_nothing_passes_while_it_stalls(peer):
    go_on = threading.Event()

    def shape(seconds, passed_bytes):
        return 1e9 if passed_bytes < 100_000 or go_on.is_set() else 0.0

    with ShapedLink(peer.address, shape) as link, connect(link) as connection:
        connection.sendall(b"x")
        data = received(connection, 100_000)
        # What is on its way may be one chunk more.
        assert len(data) <= link.passed_bytes < 100_000 + (64 << 10)
        go_on.set()
        assert data + received(connection, len(DATA) - len(data)) == DATA


def test_another_shape_counts_from_its_start(peer):
    seen = []
    with ShapedLink(peer.address, steady(1e9)) as link, connect(link) as connection:
        connection.sendall(b"x")
        received(connection, len(DATA))
        link.begin(lambda seconds, passed_bytes: seen.append((seconds, passed_bytes)) or 1e9)
        connection.sendall(b"x")
        received(connection, len(DATA))
    assert seen[0][1] == 0
    assert seen == sorted(seen)


def test_a_peer_that_is_away_ends_the_connection(peer):
    with ShapedLink(peer.address, steady(1e9)) as link:
        peer.close()
        with connect(link) as connection:
            assert connection.recv(1) == b""


def test_shapes():
    assert falls(100.0, 50)(0.0, 49) == 100.0
    assert falls(100.0, 50)(0.0, 50) == pytest.approx(10.0)
    rates = [jitters(100.0)(index * 0.05, 0) for index in range(1000)]
    assert min(rates) >= 10.0
    assert max(rates) <= 190.0
    assert 90 < sum(rates) / len(rates) < 110
    assert jitters(100.0)(0.02, 0) == jitters(100.0)(0.03, 10**6)
    stall = stalls(100.0, 50, 1.0)
    assert [stall(*moment) for moment in [(1.0, 0), (2.0, 50), (2.9, 50), (3.1, 50)]] == [100.0, 0.0, 0.0, 100.0]
