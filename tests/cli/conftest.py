"""Clients of real peers."""

import contextlib
import logging

import pytest
from peer_kit import PATIENT
from site_kit import Site

from sglang_kvcodec.rpc.client import GrpcPeer


@pytest.fixture
def connect():
    """Makes clients and closes them after the test."""
    with contextlib.ExitStack() as stack:

        def make(remote):
            client = GrpcPeer(remote, PATIENT, max_message_bytes=1)
            stack.callback(client.close)
            return client

        yield make


@pytest.fixture
def site(tmp_path):
    """A peer that asks for tokens, once ``site.serve()`` has started it."""
    with contextlib.ExitStack() as stack:
        yield Site(tmp_path, stack)


@pytest.fixture(autouse=True)
def _log_handlers_are_left_as_they_were():
    """``kvcodec serve`` sets up logging on what stderr is then; a later test must not write there."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
