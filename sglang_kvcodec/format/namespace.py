"""The namespace: everything that must agree before KV of one server may be used by another."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json

from sglang_kvcodec.format.spec import KVSpec

FORMAT_VERSION = 1
NAMESPACE_BYTES = 32
PAGE_HASH_BYTES = 32


@dataclasses.dataclass(frozen=True)
class Namespace:
    """What a page's bytes depend on besides its tokens.

    The tokens, and with them SGLang's ``extra_key`` (which holds a LoRA adapter's id) and ``cache_salt``, are named by
    the page hash: SGLang seeds the chain of hashes with both (``storage_namespace_seed`` in ``mem_cache/utils.py``).

    Attributes:
        weights_digest: hex digest of every parameter this rank has loaded.
        config_digest: hex digest of the model's configuration.
        rope: RoPE parameters as canonical JSON, empty if the model has none.
        first_layer: first layer of this pipeline rank.
        page_hash_scheme: how page hashes are made.
        adapters_digest: hex digest of the LoRA adapters, empty without any.
        calibration_digest: hex, empty for an uncalibrated profile.
    """

    weights_digest: str
    config_digest: str
    rope: str
    spec: KVSpec
    first_layer: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    page_hash_scheme: str
    adapters_digest: str
    profile: str
    stages: tuple[str, ...]
    calibration_digest: str = ""
    format_version: int = FORMAT_VERSION

    @functools.cached_property
    def digest(self) -> bytes:
        """32 bytes that name this namespace."""
        return hashlib.sha256(b"sglang-kvcodec-namespace\0" + self.to_json().encode()).digest()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        spec = {field.name: getattr(self.spec, field.name) for field in dataclasses.fields(self.spec)}
        spec["dtype"] = self.spec.dtype.torch_name
        spec["sides"] = [side.value for side in self.spec.sides]
        fields["spec"] = spec
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


@dataclasses.dataclass(frozen=True, order=True)
class PageKey:
    """The address of a page object."""

    namespace_digest: bytes
    page_hash: bytes

    def __post_init__(self) -> None:
        if len(self.namespace_digest) != NAMESPACE_BYTES or len(self.page_hash) != PAGE_HASH_BYTES:
            raise ValueError("a page key is 32 bytes of namespace digest and 32 bytes of page hash")

    def to_bytes(self) -> bytes:
        """64 bytes: namespace digest, page hash."""
        return self.namespace_digest + self.page_hash

    @classmethod
    def from_bytes(cls, data: bytes) -> PageKey:
        """Inverse of :meth:`to_bytes`."""
        return cls(bytes(data[:NAMESPACE_BYTES]), bytes(data[NAMESPACE_BYTES:]))

    def __str__(self) -> str:
        return f"{self.namespace_digest.hex()[:12]}/{self.page_hash.hex()[:12]}"
