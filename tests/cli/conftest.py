"""Clients of real peers."""

import contextlib

import pytest
from peer_kit import PATIENT

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
