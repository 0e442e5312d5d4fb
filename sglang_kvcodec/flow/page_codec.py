"""Pages to page objects and back: transform, picture codec and container in one. For one thread at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from sglang_kvcodec.errors import ChecksumError, CodecError, ForeignPageError, FormatError
from sglang_kvcodec.format.digest import plane_digest
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import GroupData, PageObject, PicturePart, SideData, build_page_object
from sglang_kvcodec.format.profile import get_profile
from sglang_kvcodec.format.spec import KVSpec, Side, layer_groups, picture_geometry
from sglang_kvcodec.transform import PackedSide, get_transform
from sglang_kvcodec.video import PictureDecoder, PictureEncoder


class PageEncoder:
    """Makes page objects of one namespace."""

    def __init__(
        self, namespace_digest: bytes, spec: KVSpec, profile_name: str, encoder: PictureEncoder | None
    ) -> None:
        """Prepares.

        Args:
            namespace_digest: 32 bytes; goes into every object.
            spec: of the pages.
            profile_name: how they are coded.
            encoder: stays the caller's; None for a profile without pictures.

        Raises:
            UnsupportedError: the profile can't code such pages.
        """
        if encoder is None and get_profile(profile_name).has_pictures:
            raise ValueError(f"profile {profile_name!r} needs an encoder")
        self._namespace_digest = namespace_digest
        self._spec = spec
        self._profile_name = profile_name
        self._encoder = encoder
        self._groups = layer_groups(spec)
        self._transform = get_transform(profile_name, spec)

    def encode(self, page_hash: bytes, values: Mapping[Side, torch.Tensor]) -> bytes:
        """The page object of one page.

        Args:
            page_hash: 32 bytes.
            values: for each of the spec's sides ``(layers, page_tokens, kv_heads, head_dim)`` in the pool's dtype.

        Raises:
            CodecError: the encoder failed.
        """
        places = [(group, side) for group in self._groups for side in self._spec.sides]
        packed = [
            self._transform.pack(values[side][None, group.first_layer : group.first_layer + group.layers])[0]
            for group, side in places
        ]
        parameter_sets, pictures = self._encode_pictures(packed)
        groups: list[GroupData] = [{} for _ in self._groups]
        for (group, side), data, picture in zip(places, packed, pictures, strict=True):
            groups[group.index][side] = SideData(picture, data.stored, data.escapes)
        key = PageKey(self._namespace_digest, page_hash)
        return build_page_object(key, self._spec, self._profile_name, groups, parameter_sets)

    def _encode_pictures(self, packed: Sequence[PackedSide]) -> tuple[bytes, Sequence[PicturePart | None]]:
        if self._encoder is None:
            return b"", [None] * len(packed)
        canvases = torch.stack([side.canvas for side in packed if side.canvas is not None]).cpu().numpy()
        encoded = self._encoder.encode(canvases)
        pictures = [
            PicturePart(data, plane_digest(canvas), side.steps)
            for data, canvas, side in zip(encoded.pictures, canvases, packed, strict=True)
        ]
        return encoded.parameter_sets, pictures


class GroupDecoder:
    """Reads layer groups out of page objects."""

    def __init__(self, spec: KVSpec, profile_name: str, decoder: PictureDecoder | None) -> None:
        """Prepares.

        Args:
            spec: of the pages.
            profile_name: how they must be coded.
            decoder: stays the caller's; None for a profile without pictures.

        Raises:
            UnsupportedError: the profile can't code such pages.
        """
        if decoder is None and get_profile(profile_name).has_pictures:
            raise ValueError(f"profile {profile_name!r} needs a decoder")
        self._spec = spec
        self._profile_name = profile_name
        self._decoder = decoder
        self._canvas_shape = picture_geometry(spec).canvas_shape
        self._groups = layer_groups(spec)
        self._transform = get_transform(profile_name, spec)

    def decode(self, pages: Sequence[PageObject], group_index: int, side: Side) -> torch.Tensor:
        """One side of one layer group of many pages.

        Returns:
            ``(pages, layers of the group, page_tokens, kv_heads, head_dim)`` in the pool's dtype, a tensor of its own.

        Raises:
            ForeignPageError: a page of another spec or profile.
            ChecksumError: a picture did not decode to what was encoded.
            FormatError: a page whose parts do not fit its profile.
            CodecError: the decoder failed.
        """
        return self._transform.restore(self._groups[group_index].layers, self.unpack(pages, group_index, side))

    def unpack(self, pages: Sequence[PageObject], group_index: int, side: Side) -> list[PackedSide]:
        """As :meth:`decode`, up to where the transform begins: checked canvases in host memory, side bytes unchecked.

        Raises:
            ForeignPageError: a page of another spec or profile.
            ChecksumError: a picture did not decode to what was encoded.
            FormatError: a page without a picture that its profile has.
            CodecError: the decoder failed.
        """
        for page in pages:
            self._refuse_foreign(page)
        data = [page.side_data(group_index, side) for page in pages]
        canvases = self._decode_pictures(pages, data)
        return [
            PackedSide(canvas, item.stored, item.escapes, item.picture.steps if item.picture else ())
            for canvas, item in zip(canvases, data, strict=True)
        ]

    def _refuse_foreign(self, page: PageObject) -> None:
        header = page.header
        if header.spec != self._spec or header.profile_name != self._profile_name:
            raise ForeignPageError(f"page {header.key} is {header.profile_name!r} of {header.spec}")
        if header.manifest.calibration_digest:
            raise ForeignPageError(f"page {header.key} needs a calibration, which {self._profile_name!r} has none of")

    def _decode_pictures(self, pages: Sequence[PageObject], data: Sequence[SideData]) -> Sequence[torch.Tensor | None]:
        """A checked canvas for each page; one decode call for all pages with the same parameter sets."""
        if self._decoder is None:
            return [None] * len(pages)
        segments: dict[bytes, list[int]] = {}
        for index, page in enumerate(pages):
            segments.setdefault(page.parameter_sets, []).append(index)
        canvases = np.empty((len(pages), *self._canvas_shape), np.uint8)
        for parameter_sets, members in segments.items():
            pictures = [_picture_of(pages[index], data[index]) for index in members]
            decoded = self._decoder.decode(parameter_sets, [picture.data for picture in pictures])
            if decoded.shape != (len(members), *self._canvas_shape):
                raise CodecError(f"pictures of {decoded.shape} came out, not of {self._canvas_shape}")
            for index, picture, canvas in zip(members, pictures, decoded, strict=True):
                if plane_digest(canvas) != picture.plane_digest:
                    raise ChecksumError(f"page {pages[index].header.key}: a picture decoded to other planes")
                canvases[index] = canvas
        return list(torch.from_numpy(canvases))


def _picture_of(page: PageObject, data: SideData) -> PicturePart:
    if data.picture is None:
        raise FormatError(f"page {page.header.key}: a side without a picture")
    return data.picture
