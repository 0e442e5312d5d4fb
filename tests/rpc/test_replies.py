"""A peer that answers nonsense is refused."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from sglang_kvcodec.config import MAX_OBJECT_BYTES
from sglang_kvcodec.errors import FormatError, PeerRejectedError
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader, FetchedMissing
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.replies import FetchChecks, lookup_result, put_results

HEADER = FetchedHeader(1, 100, bytes(40))


@pytest.mark.parametrize(
    "event",
    [
        FetchedHeader(2, 100, bytes(40)),
        FetchedHeader(0, 100, b""),
        FetchedHeader(0, 39, bytes(40)),
        FetchedHeader(0, MAX_OBJECT_BYTES + 1, bytes(40)),
        HEADER,
        FetchedMissing(2),
        FetchedFragment(2, 40, b"x"),
        FetchedFragment(0, 40, b"x"),
        FetchedFragment(0, 0, b""),
        FetchedFragment(1, 39, b"x"),
        FetchedFragment(1, 40, b""),
        FetchedFragment(1, 100, b"x"),
        FetchedFragment(1, 40, bytes(61)),
        FetchedFragment(1, 2**64 - 1, b"xx"),
    ],
)
def test_events_no_request_can_have(event):
    checks = FetchChecks([bytes(32), bytes(32)])
    checks.check(HEADER)
    checks.check(FetchedFragment(1, 40, bytes(60)))
    with pytest.raises(FormatError):
        checks.check(event)


@pytest.mark.parametrize(
    ("covered", "present"), [(0, b"\1\0"), (2, b"\1\0"), (1, b"\1\1"), (1, b"\1"), (3, b"\1\1\1"), (0, b"")]
)
def test_lookups_that_contradict_themselves(covered, present):
    with pytest.raises(FormatError):
        lookup_result(pb.LookupResponse(covered_pages=covered, present=present), 2)


@pytest.mark.parametrize("outcomes", [[], [pb.PUT_OUTCOME_STORED] * 2, [pb.PUT_OUTCOME_UNSPECIFIED], [77]])
def test_put_results_that_do_not_fit(outcomes):
    with pytest.raises(FormatError):
        put_results(pb.PutResponse(results=[pb.PutResult(outcome=outcome) for outcome in outcomes]), 1)


@pytest.fixture
def impostor(connect):
    """A client of a server that answers every call with the bytes given: ``impostor(answer)``."""
    servers = []

    def make(answer):
        server = grpc.server(ThreadPoolExecutor(2))
        servers.append(server)
        methods = {
            "Lookup": grpc.unary_unary_rpc_method_handler(lambda request, context: answer),
            "Fetch": grpc.unary_stream_rpc_method_handler(lambda request, context: iter([answer])),
            "Put": grpc.stream_unary_rpc_method_handler(lambda requests, context: (list(requests), answer)[1]),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("sglang_kvcodec.rpc.Peer", methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        return connect(f"grpc://127.0.0.1:{port}")

    yield make
    for server in servers:
        server.stop(None).wait()


@pytest.mark.parametrize(
    "answer", [b"\xff" * 9, pb.FetchResponse(missing=[7]).SerializeToString(), b"\x1a\x02\x08\x07"]
)
def test_a_fetch_is_ended(impostor, namespace, answer):
    with pytest.raises(PeerRejectedError, match="senseless"):
        list(impostor(answer).fetch(namespace, [bytes(32)]))


def test_a_lookup_and_a_put_are_refused(impostor, namespace, page):
    with pytest.raises(PeerRejectedError, match="senseless"):
        impostor(b"").lookup(namespace, [bytes(32)])
    with pytest.raises(PeerRejectedError, match="senseless"):
        impostor(b"").put(namespace, [page("a")])


def test_a_server_without_the_call(impostor):
    with pytest.raises(PeerRejectedError, match="UNIMPLEMENTED"):
        impostor(b"").stat()
