"""A peer that asks for tokens, and clients with them."""

import hashlib

from peer_kit import PATIENT, metrics_of

from sglang_kvcodec.config import Access
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.rpc.tokens import TokenEntry, append_entry
from sglang_kvcodec.testing.peer import PeerProcess


class Site:
    """A token file, and a peer that asks for its tokens."""

    def __init__(self, directory, stack):
        self.file = directory / "tokens.toml"
        self._directory = directory
        self._stack = stack

    def issue(self, name, scopes="read,write", **fields):
        """The file that holds a new token."""
        token = f"token of {name}".replace(" ", "-")
        digest = hashlib.sha256(token.encode()).digest()
        append_entry(self.file, TokenEntry(name, digest, frozenset(scopes.split(",")), **fields))
        path = self._directory / f"{name}.token"
        path.write_text(token + "\n")
        return path

    def serve(self, *arguments, store="memory:"):
        more = ["--tokens", str(self.file), "--metrics-port", "0", "--log-level", "error", *map(str, arguments)]
        self.process = self._stack.enter_context(PeerProcess(store, arguments=more))
        return self.process

    def client(self, token_file="", remote=None):
        client = GrpcPeer(remote or self.process.remote, PATIENT, access=Access(token_file=str(token_file)))
        self._stack.callback(client.close)
        return client

    def refused(self, reason):
        """How many calls the peer has refused for a reason."""
        for line in metrics_of(self.process).splitlines():
            if line.startswith(f'kvcodec_peer_refused_total{{reason="{reason}"}} '):
                return float(line.rpartition(" ")[2])
        return 0.0
