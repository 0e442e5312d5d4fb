"""The calibrated tiers as methods: page objects of each rank, as its server would store and read them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import torch

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.evaluation.entropy import channel_entropy_bits
from sglang_kvcodec.evaluation.methods import Method, MethodContext, MethodFactory, MethodResult, refuse_parameter
from sglang_kvcodec.evaluation.page_methods import NAMESPACE, ProfileMethod
from sglang_kvcodec.flow.page_codec import GroupDecoder, PageEncoder
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.page_object import PageObject, SideData
from sglang_kvcodec.format.spec import KVSpec, LayerGroup, Side
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.transform.klt import KltTransform
from sglang_kvcodec.video import open_decoder, open_encoder


class TierMethod(ProfileMethod):
    """A tier of a calibration, on one rank."""

    def __init__(self, name: str, spec: KVSpec, calibration: Calibration) -> None:
        """Opens the codec.

        Raises:
            ForeignPageError: the calibration is of another shape.
        """
        transforms = PageTransforms(spec, name, [calibration])
        pictures = open_encoder("software", uniform_blocks=True)
        encoder = PageEncoder(NAMESPACE, transforms, pictures, transforms.codings(calibration.digest)[0])
        super().__init__(name, spec, encoder, GroupDecoder(transforms, open_decoder("software")))
        self._transform = KltTransform(spec, calibration, name)

    def _ideal_bits(
        self, pages: Sequence[PageObject], group: LayerGroup, side: Side, parts: Sequence[SideData], values: int
    ) -> list[float]:
        """Entropy of the whole numbers, component by component, low bits and escapes in them; shared by the layers."""
        if not all(page.header.calibration_digest for page in pages):
            return []
        codes = self._transform.codes(group, side, self._decoder.unpack(pages, group.index, side))
        # Bits per code of each component, over values that the cut components belong to, too.
        entropy = float(channel_entropy_bits(codes.flatten(0, 1)[None])[0]) * codes.numel() / values
        return [entropy] * group.layers


class _RankedMethod:
    """Ranks side by side, each with its KV heads."""

    def __init__(self, name: str, ranks: Sequence[Method]) -> None:
        self.name = name
        self._ranks = ranks

    def roundtrip(self, kv: Mapping[Side, torch.Tensor], first_position: int) -> MethodResult:
        shares = {side: values.chunk(len(self._ranks), dim=2) for side, values in kv.items()}
        results = [
            method.roundtrip({side: parts[rank] for side, parts in shares.items()}, first_position)
            for rank, method in enumerate(self._ranks)
        ]
        ideal = [result.ideal_bits for result in results if result.ideal_bits is not None]
        return MethodResult(
            {side: torch.cat([result.kv[side] for result in results], dim=2) for side in kv},
            sum(result.coded_bytes for result in results),
            sum(result.metadata_bytes for result in results),
            {side: _means([result.bits[side] for result in results]) for side in kv},
            {side: _means([bits[side] for bits in ideal]) for side in kv} if len(ideal) == len(results) else None,
        )


def _means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))


def make_tier(name: str) -> MethodFactory:
    """A factory of the method that is the tier ``name``."""
    return functools.partial(_make_tier, name)


def _make_tier(name: str, context: MethodContext, parameter: str) -> Method:
    refuse_parameter(name, parameter)
    calibrations = sorted(context.calibrations, key=lambda calibration: calibration.layout.tp_rank)
    if not calibrations:
        raise ConfigurationError(f"method {name!r} needs a calibration: --calibration, see kvcodec calibrate")
    ranks = calibrations[0].layout.tp_size
    if [calibration.layout.tp_rank for calibration in calibrations] != list(range(ranks)):
        raise ConfigurationError(f"the calibrations are not those of {ranks} ranks, one of each")
    spec = dataclasses.replace(context.spec, kv_heads=context.spec.kv_heads // ranks)
    methods = [TierMethod(name, spec, calibration) for calibration in calibrations]
    return methods[0] if ranks == 1 else _RankedMethod(name, methods)
