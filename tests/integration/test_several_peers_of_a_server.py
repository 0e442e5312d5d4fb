"""A real SGLang server with three real peers, one of which is killed and comes back."""

import contextlib

import pytest
from integration.cluster import MODEL, PAGE_TOKENS, ask, forget, metric, wait_for

from sglang_kvcodec.testing.conversation import source_slices
from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.testing.processes import KVCodecArgs, SGLangProcess

pytestmark = pytest.mark.sglang


def test_a_peer_is_lost_and_comes_back(tmp_path):
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(PeerProcess(f"lmdb:{tmp_path / str(number)}")) for number in range(3)]
        remote = "grpc://" + ",".join(peer.address for peer in peers)
        server = SGLangProcess("several", MODEL, tmp_path / "server.log", KVCodecArgs(remote, "exact"))
        stack.callback(server.kill)
        server.wait_ready()
        wait_for(lambda: metric(server, "kvcodec_peers_up") == 3, "three peers")
        (text,) = source_slices([2200], "argparse")
        computed = ask(server, text)
        assert computed.cached.storage == 0
        assert server.client.wait_published()
        whole_tokens = (computed.prompt_tokens - 1) // PAGE_TOKENS * PAGE_TOKENS
        for peer in peers[:2]:
            forget(server)
            peer.kill()
            # The request itself may be what finds out.
            restored = ask(server, text)
            assert restored.text == computed.text
            assert restored.cached.storage == whole_tokens
            wait_for(lambda: metric(server, "kvcodec_peers_up") == 2, "sign of the loss")
            assert metric(server, "kvcodec_peer_up") == 1
            peer.restart()
            wait_for(lambda: metric(server, "kvcodec_peers_up") == 3, "sign of the return")
        forget(server)
        assert ask(server, text).cached.storage == whole_tokens
