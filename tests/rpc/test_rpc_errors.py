"""The seam between gRPC's statuses and our errors is complete."""

import grpc
import pytest

from sglang_kvcodec import errors
from sglang_kvcodec.rpc.errors import PEER_ERRORS_BY_STATUS, peer_error, status_of


def test_every_status_has_an_error():
    assert set(PEER_ERRORS_BY_STATUS) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


@pytest.mark.parametrize("code", PEER_ERRORS_BY_STATUS)
def test_an_error_says_what_and_where(code):
    error = peer_error(code, None, "Fetch", "host:1")
    assert isinstance(error, errors.PeerUnavailableError | errors.PeerTimeoutError | errors.PeerRejectedError)
    assert "Fetch at host:1" in str(error)
    assert code.name in str(error)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.FormatError("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.TruncatedError("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (errors.NotFoundError("x"), grpc.StatusCode.NOT_FOUND),
        (errors.CapacityError("x"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.ClientLimitError("x"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (errors.UnauthenticatedError("x"), grpc.StatusCode.UNAUTHENTICATED),
        (errors.ForbiddenError("x"), grpc.StatusCode.PERMISSION_DENIED),
        (errors.StorageUnavailableError("x"), grpc.StatusCode.UNAVAILABLE),
        (errors.PeerTimeoutError("x"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (errors.CodecError("x"), grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_statuses_of_our_errors(error, code):
    assert status_of(error) == (code, "x")


def test_the_words_of_a_strange_error_stay_here():
    code, sentence = status_of(KeyError("a secret"))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "secret" not in sentence
