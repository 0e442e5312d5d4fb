"""What is counted of each client, and that no number of them grows without bound."""

import contextlib

import pytest

from sglang_kvcodec.rpc.client_tallies import ClientTallies


def test_a_call_counts_while_it_lasts_and_after():
    tallies = ClientTallies()
    with tallies.call("a") as tally, tallies.call("a"):
        tally.sent_bytes += 5
        (told,) = tallies.top(9)
        assert (told.name, told.open_calls, told.calls, told.sent_bytes) == ("a", 2, 2, 5)
    (told,) = tallies.top(9)
    assert (told.open_calls, told.calls) == (0, 2)


def test_a_call_that_fails_is_no_longer_open():
    tallies = ClientTallies()
    with pytest.raises(ValueError, match="x"), tallies.call("a"):
        raise ValueError("x")
    assert tallies.top(9)[0].open_calls == 0


def test_what_is_told_is_a_copy():
    tallies = ClientTallies()
    with tallies.call("a"):
        tallies.top(9)[0].sent_bytes = 9
    assert tallies.top(9)[0].sent_bytes == 0


def test_clients_that_called_long_ago_are_forgotten_but_not_those_with_an_open_call():
    tallies = ClientTallies(clients=2)
    with contextlib.ExitStack() as stack:
        stack.enter_context(tallies.call("open"))
        for name in ("a", "b", "c"):
            with tallies.call(name):
                pass
        assert [tally.name for tally in tallies.top(9)] == ["open", "c"]
        assert [tally.name for tally in tallies.top(1)] == ["open"]
    with tallies.call("d"):
        assert [tally.name for tally in tallies.top(9)] == ["d", "c"]
    assert len(tallies) == 2
