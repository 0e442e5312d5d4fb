"""Page objects made on the spot, and read back."""

from __future__ import annotations

import hashlib

import torch

from sglang_kvcodec.flow.page_codec import GroupDecoder, PageEncoder
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.profile import get_profile
from sglang_kvcodec.format.spec import KVSpec, Side, layer_groups
from sglang_kvcodec.testing.synthetic import page_values
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.video import open_decoder, open_encoder


def hash_of(name: object) -> bytes:
    """A page hash for whatever a test calls its page."""
    return hashlib.sha256(repr(name).encode()).digest()


def new_encoder(namespace_digest: bytes, spec: KVSpec, profile: str) -> PageEncoder:
    """An encoder for one thread."""
    return PageEncoder(
        namespace_digest, PageTransforms(spec, profile), open_encoder() if get_profile(profile).has_pictures else None
    )


def new_decoder(spec: KVSpec, profile: str) -> GroupDecoder:
    """A decoder for one thread."""
    return GroupDecoder(PageTransforms(spec, profile), open_decoder() if get_profile(profile).has_pictures else None)


class Pages:
    """Pages of one spec, profile and namespace, by name: the same values for the same name."""

    def __init__(self, spec: KVSpec, profile: str, namespace_digest: bytes) -> None:
        """Opens a codec if the profile needs one."""
        self.spec = spec
        self.profile = profile
        self.namespace_digest = namespace_digest
        self._encoder = new_encoder(namespace_digest, spec, profile)

    def values(self, name: object) -> dict[Side, torch.Tensor]:
        """The KV of a page: per side ``(layers, page_tokens, kv_heads, head_dim)``."""
        return page_values(self.spec, seed=int.from_bytes(hash_of(name)[:4], "big"))

    def coded(self, name: object) -> bytes:
        """The page object's bytes."""
        return self._encoder.encode(hash_of(name), self.values(name))

    def page(self, name: object) -> PageObject:
        """The page object, checked."""
        return PageObject(self.coded(name))

    def key(self, name: object) -> bytes:
        """The storage key."""
        return PageKey(self.namespace_digest, hash_of(name)).to_bytes()

    def decode(self, page: PageObject) -> dict[Side, torch.Tensor]:
        """Inverse of the encoder; as :meth:`values`."""
        decoder = new_decoder(self.spec, self.profile)
        return {
            side: torch.cat([decoder.decode([page], group.index, side)[0] for group in layer_groups(self.spec)])
            for side in self.spec.sides
        }
