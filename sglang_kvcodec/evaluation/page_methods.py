"""Methods that code page by page: the package's own profiles, and general compressors on the exact bytes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.evaluation.entropy import channel_entropy_bits
from sglang_kvcodec.evaluation.methods import (
    KV,
    MethodContext,
    MethodFactory,
    MethodResult,
    even_bits,
    refuse_parameter,
)
from sglang_kvcodec.flow.page_codec import GroupDecoder, PageEncoder
from sglang_kvcodec.format.page_object import PageObject, SideData
from sglang_kvcodec.format.profile import check_supported, get_profile
from sglang_kvcodec.format.spec import KVSpec, LayerGroup, Side, layer_groups, picture_geometry
from sglang_kvcodec.transform import PackedSide, PageTransforms
from sglang_kvcodec.transform.layout import from_canvas
from sglang_kvcodec.video import open_decoder, open_encoder

NAMESPACE = hashlib.sha256(b"evaluation").digest()
"""Of pages that nobody keeps."""


class ProfileMethod:
    """A profile of this package: page objects as a peer would store them, read back as a server would read them."""

    def __init__(self, name: str, spec: KVSpec, encoder: PageEncoder, decoder: GroupDecoder) -> None:
        """Takes the coder of page objects.

        Args:
            name: of the method.
            spec: of the pages.
            encoder: makes them.
            decoder: reads them.
        """
        self.name = name
        self._spec = spec
        self._encoder = encoder
        self._decoder = decoder

    def roundtrip(self, kv: Mapping[Side, torch.Tensor], first_position: int) -> MethodResult:
        """See ``Method.roundtrip``."""
        spec = self._spec
        pages = _pages(kv, spec.page_tokens)
        objects = [
            self.encode(
                _page_hash(first_position + index * spec.page_tokens), page, first_position + index * spec.page_tokens
            )
            for index, page in enumerate(pages)
        ]
        loaded = [PageObject(data) for data in objects]
        restored: dict[Side, list[torch.Tensor]] = {side: [] for side in spec.sides}
        bits: dict[Side, list[float]] = {side: [] for side in spec.sides}
        ideal: dict[Side, list[float]] = {side: [] for side in spec.sides}
        payload_bytes = 0
        for group in layer_groups(spec):
            for side in spec.sides:
                values = self.decode(loaded, group, side, first_position)
                restored[side].append(values.transpose(0, 1).flatten(1, 2))
                parts = [page.side_data(group.index, side) for page in loaded]
                part_bytes = sum(map(_part_bytes, parts))
                payload_bytes += part_bytes
                bits[side] += [8 * part_bytes / values.numel()] * group.layers
                ideal[side] += self._ideal_bits(loaded, group, side, parts, values.numel())
        coded_bytes = sum(map(len, objects))
        return MethodResult(
            {side: torch.cat(groups) for side, groups in restored.items()},
            coded_bytes,
            coded_bytes - payload_bytes,
            {side: tuple(figures) for side, figures in bits.items()},
            {side: tuple(figures) for side, figures in ideal.items()} if ideal[spec.sides[0]] else None,
        )

    def encode(self, page_hash: bytes, page: KV, position: int) -> bytes:
        """The page object of the page that begins at ``position``."""
        return self._encoder.encode(page_hash, page, position)

    def decode(self, pages: Sequence[PageObject], group: LayerGroup, side: Side, first_position: int) -> torch.Tensor:
        """``(pages, layers of the group, page_tokens, kv_heads, head_dim)`` of pages that follow each other."""
        return self._decoder.decode(pages, group.index, side)

    def _ideal_bits(
        self, pages: Sequence[PageObject], group: LayerGroup, side: Side, parts: Sequence[SideData], values: int
    ) -> list[float]:
        """Entropy of what is on the canvases, channel by channel, and what is beside them at its size."""
        unpacked: list[PackedSide] = self._decoder.unpack(pages, group.index, side)
        canvases = [packed.canvas for packed in unpacked if packed.canvas is not None]
        if not canvases:
            return []
        codes = from_canvas(torch.stack(canvases), picture_geometry(self._spec), group.layers)
        entropy = channel_entropy_bits(codes.transpose(0, 1).flatten(1, 2))
        beside_bytes = sum(len(part.stored) + len(part.escapes) for part in parts)
        return [bits + 8 * beside_bytes / values for bits in entropy.tolist()]


class CompressorMethod:
    """A general compressor on the bytes of each page and side."""

    def __init__(self, name: str, spec: KVSpec, compress: Callable[[bytes], bytes]) -> None:
        """Compresses with ``compress``, which must be lossless: KV comes back as it went in."""
        self.name = name
        self._page_tokens = spec.page_tokens
        self._compress = compress

    def roundtrip(self, kv: Mapping[Side, torch.Tensor], first_position: int) -> MethodResult:
        """See ``Method.roundtrip``."""
        sizes = dict.fromkeys(kv, 0)
        for page in _pages(kv, self._page_tokens):
            for side, values in page.items():
                sizes[side] += len(self._compress(values.contiguous().view(torch.uint8).numpy().tobytes()))
        return MethodResult(dict(kv), sum(sizes.values()), 0, even_bits(kv, sizes))


def _pages(kv: Mapping[Side, torch.Tensor], page_tokens: int) -> list[KV]:
    by_side = {side: torch.split(tensor, page_tokens, 1) for side, tensor in kv.items()}
    count = len(next(iter(by_side.values())))
    return [{side: pages[index] for side, pages in by_side.items()} for index in range(count)]


def _page_hash(position: int) -> bytes:
    return hashlib.sha256(b"page at %d" % position).digest()


def _part_bytes(data: SideData) -> int:
    return (len(data.picture.data) if data.picture else 0) + len(data.stored) + len(data.escapes)


def make_profile(name: str, profile: str) -> MethodFactory:
    """A factory of the method ``name``, which is the uncalibrated profile ``profile``."""
    return functools.partial(_make_profile, name, profile)


def _make_profile(name: str, profile: str, context: MethodContext, parameter: str) -> ProfileMethod:
    refuse_parameter(name, parameter)
    check_supported(get_profile(profile), context.spec.dtype)
    has_pictures = get_profile(profile).has_pictures
    transforms = PageTransforms(context.spec, profile)
    encoder = PageEncoder(NAMESPACE, transforms, open_encoder("software") if has_pictures else None)
    decoder = GroupDecoder(transforms, open_decoder("software") if has_pictures else None)
    return ProfileMethod(name, context.spec, encoder, decoder)


def make_zstd(context: MethodContext, parameter: str) -> CompressorMethod:
    """``zstd``: level 3, or ``zstd@LEVEL``."""
    if parameter and not (parameter.isdecimal() and 1 <= int(parameter) <= 22):
        raise ConfigurationError(f"zstd@{parameter} is no method; levels are 1 to 22")
    try:
        import zstandard
    except ImportError as error:
        raise ConfigurationError(
            "method 'zstd' needs the package zstandard: pip install \"sglang-kvcodec[bench]\""
        ) from error
    level = int(parameter or 3)
    return CompressorMethod(f"zstd@{level}", context.spec, zstandard.ZstdCompressor(level=level).compress)


def make_lz4(context: MethodContext, parameter: str) -> CompressorMethod:
    """``lz4``."""
    refuse_parameter("lz4", parameter)
    try:
        import lz4.frame
    except ImportError as error:
        raise ConfigurationError("method 'lz4' needs the package lz4: pip install \"sglang-kvcodec[bench]\"") from error
    return CompressorMethod("lz4", context.spec, lz4.frame.compress)
