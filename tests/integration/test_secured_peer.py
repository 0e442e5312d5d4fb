"""A real SGLang server and a peer that asks for TLS and a token: what is not accepted is a miss until it is."""

import contextlib
import hashlib
import shutil

import pytest
from cli.pki_kit import DAY, Authority
from integration.cluster import MODEL, PAGE_TOKENS, ask, forget, metric, wait_for, wait_up

from sglang_kvcodec.rpc.tokens import TokenEntry, append_entry
from sglang_kvcodec.testing.conversation import source_slices
from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.testing.processes import KVCodecArgs, SGLangProcess

pytestmark = pytest.mark.sglang

READ_WRITE = frozenset({"read", "write"})


def entry(name, token):
    return TokenEntry(name, hashlib.sha256(token.encode()).digest(), READ_WRITE, tenant="team")


def test_certificates_and_tokens_come_and_go_under_a_running_server(tmp_path):
    authority = Authority(tmp_path)
    certificate, key = authority.issue("peer", starts=-2 * DAY, ends=-DAY)
    tokens, mine = tmp_path / "tokens.toml", tmp_path / "token"
    append_entry(tokens, entry("first", "first-token"))
    mine.write_text("first-token\n")
    arguments = ["--tls-cert", str(certificate), "--tls-key", str(key), "--tokens", str(tokens)]
    access = ("--kvcodec-tls-ca", str(authority.file), "--kvcodec-token-file", str(mine))
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(PeerProcess(f"lmdb:{tmp_path / 'store'}", arguments=arguments))
        assert peer.remote.startswith("grpcs://")
        server = SGLangProcess("secured", MODEL, tmp_path / "server.log", KVCodecArgs(peer.remote, "exact", access))
        stack.callback(server.kill)
        server.wait_ready()
        (text,) = source_slices([2200], "argparse")
        # The certificate has expired.
        computed = ask(server, text)
        assert computed.cached.storage == 0
        assert metric(server, "kvcodec_peer_up") == 0
        assert metric(server, "kvcodec_peer_errors_total", reason="peer_untrusted") > 0
        assert "expired" in server.log_text()

        new_certificate, new_key = authority.issue("new")
        shutil.copy(new_key, key)
        shutil.copy(new_certificate, certificate)
        wait_up(server)
        forget(server)
        assert ask(server, text).text == computed.text
        assert server.client.wait_published()
        forget(server)
        restored = ask(server, text)
        assert restored.text == computed.text
        assert restored.cached.storage == (computed.prompt_tokens - 1) // PAGE_TOKENS * PAGE_TOKENS

        tokens.write_text(tokens.read_text().replace(entry("first", "first-token").sha256.hex(), "0" * 64))
        wait_for(lambda: metric(server, "kvcodec_peer_up") == 0, "sign that the token is refused")
        forget(server)
        denied = ask(server, text)
        assert denied.text == computed.text
        assert denied.cached.storage == 0
        assert metric(server, "kvcodec_peer_errors_total", reason="peer_denied") > 0

        append_entry(tokens, entry("second", "second-token"))
        mine.write_text("second-token\n")
        wait_up(server)
        forget(server)
        assert ask(server, text).cached.storage == restored.cached.storage
