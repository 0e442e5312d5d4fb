"""What becomes of a call that ends in the middle, by its status and in the log."""

import asyncio
import logging

import grpc
import grpc.aio
import pytest

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.rpc.admission import Admission
from sglang_kvcodec.rpc.calls import Calls
from sglang_kvcodec.rpc.peer_limits import PeerLimits


class ClientThatHasGone:
    """As gRPC shows it: no message can be sent, and for a moment the call is not done."""

    def __init__(self):
        self.aborted = []

    def peer(self):
        return "ipv4:127.0.0.1:1"

    def done(self):
        return False

    async def write(self, message):
        raise grpc.aio.InternalError('Failed "execute_batch"')

    async def abort(self, code, details):
        self.aborted.append(code)
        raise grpc.aio.AbortError(details)


def test_a_client_that_goes_in_the_middle_of_a_message_is_no_failure_of_the_peer(caplog):
    """Counted as such, it would be an alert, and in the log a traceback."""
    calls, context = Calls(Admission(None), PeerLimits()), ClientThatHasGone()
    counters = [peer_metrics.PEER_RPCS.labels("Fetch", status)._value for status in ("CANCELLED", "UNAVAILABLE")]
    before = [counter.get() for counter in counters]

    async def fetch():
        async with calls("Fetch", context) as call:
            await call.write(b"message", 7)

    with caplog.at_level(logging.INFO), pytest.raises(grpc.aio.AbortError):
        asyncio.run(fetch())
    assert [counter.get() for counter in counters] == [before[0] + 1, before[1]]
    # Whoever should be there after all does not take what has come for all.
    assert context.aborted == [grpc.StatusCode.UNAVAILABLE]
    assert caplog.records == []
