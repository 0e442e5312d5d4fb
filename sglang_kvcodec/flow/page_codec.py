"""Pages to page objects and back: transform, picture codec and container in one. For one thread at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch

from sglang_kvcodec.errors import ChecksumError, CodecError, FormatError
from sglang_kvcodec.format.digest import plane_digest
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import GroupData, PageObject, PicturePart, SideData, build_page_object
from sglang_kvcodec.format.profile import EXACT, Coding
from sglang_kvcodec.format.spec import Side, layer_groups
from sglang_kvcodec.interpreter import BACKGROUND_TURN
from sglang_kvcodec.transform import PackedSide, PageTransform, PageTransforms
from sglang_kvcodec.video import (
    Canvases,
    DecodedFrames,
    DeviceCanvases,
    DeviceEncoder,
    EncodedPictures,
    FrameDecoder,
    PictureEncoder,
)
from sglang_kvcodec.video.parameter_sets import check_parameter_sets


@dataclasses.dataclass(frozen=True)
class PackedPage:
    """A page that was packed where it lay: all that an encoder needs of it.

    Attributes:
        profile_name: of its coding.
        calibration_digest: of its calibration; empty for none.
        first_position: of its first token; 0 where the coding does not depend on it.
        sides: side after side of group after group; their canvases are parts of ``canvases``.
        canvases: uint8 ``(pictures, height * 3 // 2, width)``, contiguous and written.
        digests: of the planes of each, if they are where the encoder takes them from a device; None in host memory.
    """

    profile_name: str
    calibration_digest: bytes
    first_position: int
    sides: Sequence[PackedSide]
    canvases: torch.Tensor
    digests: Sequence[int] | None = None

    @property
    def is_on_device(self) -> bool:
        """Whether its pictures are for an encoder that takes them from a device."""
        return self.digests is not None

    @property
    def size_bytes(self) -> int:
        """What it holds."""
        return self.canvases.numel() + sum(len(side.stored) + len(side.escapes) for side in self.sides)


class PageEncoder:
    """Makes page objects of one namespace."""

    def __init__(
        self,
        namespace_digest: bytes,
        transforms: PageTransforms,
        encoder: PictureEncoder | None,
        coding: Coding | None = None,
    ) -> None:
        """Prepares.

        Args:
            namespace_digest: 32 bytes; goes into every object.
            transforms: of the pages and of what the operator asked for.
            encoder: stays the caller's; None for a profile without pictures.
            coding: how to code; None for what the best tier of ``transforms`` is coded with without a calibration.

        Raises:
            ForeignPageError: ``transforms`` does not know the calibration.
        """
        coding = coding or transforms.codings()[0]
        profile = coding.profile
        if encoder is None and profile.has_pictures:
            raise ValueError(f"profile {profile.name!r} needs an encoder")
        self._namespace_digest = namespace_digest
        self._transforms = transforms
        self._profile = profile
        self._calibration_digest = coding.calibration_digest
        self._encoder = encoder if profile.has_pictures else None
        self._groups = layer_groups(transforms.spec)
        self._transform = transforms.get(*coding)

    def encode(self, page_hash: bytes, values: Mapping[Side, torch.Tensor], first_position: int = 0) -> bytes:
        """The page object of one page. One whose values a calibrated tier can't code becomes an ``exact`` one.

        Args:
            page_hash: 32 bytes.
            values: for each of the spec's sides ``(layers, page_tokens, kv_heads, head_dim)`` in the pool's dtype.
            first_position: of the page's first token; only calibrated tiers use it.

        Raises:
            CodecError: the encoder failed.
        """
        if not self._calibration_digest:
            # One page has one coding: what does not depend on the position does not say it.
            first_position = 0
        packed = self._pack(self._transform, values, first_position)
        if packed is not None:
            coded = self._encode_pictures(packed)
            return self._build(page_hash, packed, self._profile.name, self._calibration_digest, first_position, coded)
        exact = self._pack(self._transforms.get(EXACT.name), values, 0)
        assert exact is not None, "exact codes whatever there is"
        return self._build(page_hash, exact, EXACT.name, b"", 0, self._encode_pictures(exact))

    def encode_packed(self, page_hash: bytes, page: PackedPage) -> bytes:
        """The page object of a page that was packed for this namespace, or as an ``exact`` one.

        Args:
            page_hash: 32 bytes.
            page: on a device only if the encoder is a ``DeviceEncoder``.

        Raises:
            CodecError: the encoder failed.
        """
        if page.digests is None:
            coded = self._encode_canvases(page.canvases.numpy(), page.sides)
        else:
            encoded = self._encode_on_device(page.canvases)
            coded = encoded.parameter_sets, _picture_parts(encoded, page.digests, page.sides)
        return self._build(
            page_hash, page.sides, page.profile_name, page.calibration_digest, page.first_position, coded
        )

    def _pack(
        self, transform: PageTransform, values: Mapping[Side, torch.Tensor], first_position: int
    ) -> list[PackedSide] | None:
        """Side after side of group after group."""
        result = []
        for group in self._groups:
            layers = slice(group.first_layer, group.first_layer + group.layers)
            for side in self._transforms.spec.sides:
                packed = transform.pack(group, side, values[side][None, layers], [first_position])
                if packed is None:
                    return None
                result += packed
        return result

    def _build(
        self,
        page_hash: bytes,
        packed: Sequence[PackedSide],
        profile_name: str,
        calibration_digest: bytes,
        first_position: int,
        coded: tuple[bytes, Sequence[PicturePart | None]],
    ) -> bytes:
        spec = self._transforms.spec
        parameter_sets, pictures = coded
        groups: list[GroupData] = [{} for _ in self._groups]
        places = [(group, side) for group in self._groups for side in spec.sides]
        for (group, side), data, picture in zip(places, packed, pictures, strict=True):
            groups[group.index][side] = SideData(picture, data.stored, data.escapes)
        return build_page_object(
            PageKey(self._namespace_digest, page_hash),
            spec,
            profile_name,
            groups,
            parameter_sets,
            calibration_digest,
            first_position,
            self._transforms.get(profile_name, calibration_digest).canvas_shape,
        )

    def _encode_pictures(self, packed: Sequence[PackedSide]) -> tuple[bytes, Sequence[PicturePart | None]]:
        if self._encoder is None:
            return b"", [None] * len(packed)
        canvases = torch.stack([side.canvas for side in packed if side.canvas is not None]).cpu().numpy()
        return self._encode_canvases(canvases, packed)

    def _encode_canvases(
        self, canvases: Canvases, packed: Sequence[PackedSide]
    ) -> tuple[bytes, Sequence[PicturePart | None]]:
        assert self._encoder is not None, "a profile with pictures has one"
        encoded = self._encoder.encode(canvases)
        return encoded.parameter_sets, _picture_parts(encoded, map(plane_digest, canvases), packed)

    def _encode_on_device(self, canvases: torch.Tensor) -> EncodedPictures:
        pictures, rows, width = canvases.shape
        # Only an encoder that says so of itself is given pages that stay on a device.
        encoder = cast(DeviceEncoder, self._encoder)
        return encoder.encode_device(
            DeviceCanvases(canvases.data_ptr(), pictures, rows, width, lambda index: canvases[index].cpu().numpy())
        )


def _picture_parts(
    encoded: EncodedPictures, digests: Iterable[int], packed: Sequence[PackedSide]
) -> list[PicturePart | None]:
    return [
        PicturePart(data, digest, side.steps)
        for data, digest, side in zip(encoded.pictures, digests, packed, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class DecodedSegment:
    """Pictures of one side of one layer group that were decoded in one call, where the decoder left them.

    Attributes:
        members: indices of their pages.
        frames: their planes, in that order. **Unchecked**: whoever uses them compares the digests that ``data`` states.
        data: their coded data; the picture, with its digest and steps, and the side bytes.
    """

    members: Sequence[int]
    frames: DecodedFrames
    data: Sequence[SideData]


class GroupDecoder:
    """Reads layer groups out of page objects."""

    def __init__(self, transforms: PageTransforms, decoder: FrameDecoder | None) -> None:
        """Prepares.

        Args:
            transforms: of the pages and of what the operator asked for.
            decoder: stays the caller's; None for a profile without pictures.
        """
        if decoder is None and transforms.have_pictures:
            raise ValueError(f"profiles {transforms.tiers} need a decoder")
        self._transforms = transforms
        self._decoder = decoder
        self._groups = layer_groups(transforms.spec)

    @property
    def device(self) -> int | None:
        """Ordinal of the CUDA device on which :meth:`decode_frames` leaves planes; None in host memory."""
        return self._decoder.device if self._decoder is not None else None

    def decode(self, pages: Sequence[PageObject], group_index: int, side: Side) -> torch.Tensor:
        """One side of one layer group of many pages.

        Returns:
            ``(pages, layers of the group, page_tokens, kv_heads, head_dim)`` in the pool's dtype, a tensor of its own.

        Raises:
            ForeignPageError: a page of another spec or profile, or with an unknown calibration.
            ChecksumError: a picture did not decode to what was encoded.
            FormatError: a page whose parts do not fit its profile.
            CodecError: the decoder failed.
        """
        return self.restore(pages, self.unpack(pages, group_index, side), group_index, side)

    def unpack(self, pages: Sequence[PageObject], group_index: int, side: Side) -> list[PackedSide]:
        """As :meth:`decode`, up to where the transform begins: checked canvases in host memory, side bytes unchecked.

        Raises:
            ForeignPageError: a page of another spec or profile, or with an unknown calibration.
            ChecksumError: a picture did not decode to what was encoded.
            FormatError: a page without a picture that its profile has.
            CodecError: the decoder failed.
        """
        for page in pages:
            self._transforms.check(page.header)
        data = [page.side_data(group_index, side) for page in pages]
        canvases = self._decode_pictures(pages, data)
        return [
            PackedSide(canvas, item.stored, item.escapes, item.picture.steps if item.picture else ())
            for canvas, item in zip(canvases, data, strict=True)
        ]

    def decode_frames(self, pages: Sequence[PageObject], group_index: int, side: Side) -> Iterator[DecodedSegment]:
        """As :meth:`unpack`, without copying planes off the decoder's device and without checking them.

        Yields:
            Segments with pictures of one size each; one for most calls. Pages without pictures are in none. Each is
            valid until the next is asked for, and the last until the next call of any method here; see
            ``DecodedFrames``.

        Raises:
            ForeignPageError, FormatError, CodecError: as :meth:`unpack`.
        """
        if self._decoder is None:
            raise ValueError(f"profiles {self._transforms.tiers} have no pictures")
        with BACKGROUND_TURN:
            for page in pages:
                self._transforms.check(page.header)
            data = [page.side_data(group_index, side) for page in pages]
            segments = self._segments(pages)
        for (canvas_shape, parameter_sets), members in segments.items():
            pictures = [_picture_of(pages[index], data[index]) for index in members]
            _check_size(parameter_sets, canvas_shape)
            frames = self._decoder.decode_frames(parameter_sets, [picture.data for picture in pictures])
            if frames.canvas_shape != canvas_shape:
                raise CodecError(f"pictures of {frames.canvas_shape} came out, not of {canvas_shape}")
            yield DecodedSegment(members, frames, [data[index] for index in members])

    def digest_mismatch(self, page: PageObject) -> ChecksumError:
        """The error for a picture of ``page`` that decoded to other planes; gives its decoder up, which may be why."""
        if self._decoder is not None:
            self._decoder.replace()
        return ChecksumError(f"page {page.header.key}: a picture decoded to other planes")

    def restore(
        self, pages: Sequence[PageObject], packed: Sequence[PackedSide], group_index: int, side: Side
    ) -> torch.Tensor:
        """The rest of :meth:`decode`, from what :meth:`unpack` gave; on a device it runs on the current stream.

        Raises:
            FormatError: a page whose parts do not fit its profile.
        """
        group = self._groups[group_index]
        alike = alike_pages(pages)
        parts = [
            self._transforms.get(*coding).restore(
                group,
                side,
                [packed[index] for index in members],
                [pages[index].header.first_position for index in members],
            )
            for coding, members in alike.items()
        ]
        if len(parts) == 1:
            return parts[0]
        values = torch.cat([part.to(parts[0].device) for part in parts])
        order = torch.tensor([index for members in alike.values() for index in members], device=values.device)
        return values[torch.argsort(order)]

    def _decode_pictures(self, pages: Sequence[PageObject], data: Sequence[SideData]) -> Sequence[torch.Tensor | None]:
        """A checked canvas for each page that has one; one decode call for all pages with the same parameter sets."""
        if self._decoder is None:
            return [None] * len(pages)
        canvases: list[torch.Tensor | None] = [None] * len(pages)
        for (canvas_shape, parameter_sets), members in self._segments(pages).items():
            pictures = [_picture_of(pages[index], data[index]) for index in members]
            _check_size(parameter_sets, canvas_shape)
            decoded = self._decoder.decode(parameter_sets, [picture.data for picture in pictures])
            if decoded.shape != (len(members), *canvas_shape):
                raise CodecError(f"pictures of {decoded.shape} came out, not of {canvas_shape}")
            # What the decoder gave lives until its next call.
            kept = torch.from_numpy(decoded.copy())
            for index, picture, canvas in zip(members, pictures, decoded, strict=True):
                if plane_digest(canvas) != picture.plane_digest:
                    raise self.digest_mismatch(pages[index])
            for index, canvas in zip(members, kept, strict=True):
                canvases[index] = canvas
        return canvases

    def _segments(self, pages: Sequence[PageObject]) -> dict[tuple[tuple[int, int], bytes], list[int]]:
        """Canvas shape and parameter sets -> the pages whose pictures decode together; none of a profile without."""
        segments: dict[tuple[tuple[int, int], bytes], list[int]] = {}
        for index, page in enumerate(pages):
            coding = page.header.coding
            if coding.profile.has_pictures:
                shape = self._transforms.get(*coding).canvas_shape
                segments.setdefault((shape, page.parameter_sets), []).append(index)
        return segments


def alike_pages(pages: Sequence[PageObject]) -> Mapping[Coding, list[int]]:
    """Coding -> the indices of its pages, in their order."""
    alike: dict[Coding, list[int]] = {}
    for index, page in enumerate(pages):
        alike.setdefault(page.header.coding, []).append(index)
    return alike


def _check_size(parameter_sets: bytes, canvas_shape: tuple[int, int]) -> None:
    """Before decoding: a decoder takes memory for pictures as large as they are said to be, which may be 8192x8192."""
    stated = check_parameter_sets(parameter_sets)
    if (stated.height * 3 // 2, stated.width) != canvas_shape:
        raise CodecError(f"pictures of {stated.width}x{stated.height} are stated, for canvases of {canvas_shape}")


def _picture_of(page: PageObject, data: SideData) -> PicturePart:
    if data.picture is None:
        raise FormatError(f"page {page.header.key}: a side without a picture")
    return data.picture
