import pytest

from sglang_kvcodec.rpc.limits import DEFAULT_MESSAGE_BYTES
from sglang_kvcodec.rpc.message_pace import FIRST_BYTES, LEAST_BYTES, LEAST_WATCHED_S, MESSAGE_S, MessagePace


@pytest.fixture
def pace():
    return MessagePace(DEFAULT_MESSAGE_BYTES)


def test_messages_are_small_while_nothing_is_known(pace):
    assert pace.wanted_bytes() == FIRST_BYTES
    # Too brief to tell how fast it is.
    pace.watch(100_000, LEAST_WATCHED_S / 2)
    assert pace.wanted_bytes() == FIRST_BYTES
    # But fast, whatever it is exactly.
    pace.watch(1 << 30, LEAST_WATCHED_S / 2)
    assert pace.wanted_bytes() == 0


@pytest.mark.parametrize("bytes_per_s", [1.25e6, 1e7])
def test_a_message_takes_a_moment(pace, bytes_per_s):
    pace.watch(int(bytes_per_s), 1.0)
    assert pace.wanted_bytes() == pytest.approx(MESSAGE_S * bytes_per_s, rel=0.01)


def test_between_bounds(pace):
    pace.watch(10_000, 1.0)
    assert pace.wanted_bytes() == LEAST_BYTES
    pace.watch(DEFAULT_MESSAGE_BYTES, MESSAGE_S)
    assert pace.wanted_bytes() == 0
    # A link that is fast again.
    pace.watch(1_000_000, 1.0)
    assert 0 < pace.wanted_bytes() < DEFAULT_MESSAGE_BYTES
