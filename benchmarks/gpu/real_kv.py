"""Real KV and calibrations of it, without a model: what ``make_real_kv`` has kept of the test model.

The test model's pictures are smaller than those of the models that are served. So heads of a larger model are put
together from the same page of different documents, and its bases from as many copies of the calibration's: pictures
have the size of that model's and the statistics of the test model's.
"""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import torch

from sglang_kvcodec.flow.page_codec import GroupDecoder, PageEncoder
from sglang_kvcodec.format.calibration import Basis, Calibration, GainModel, Tier
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.video import open_decoder, open_encoder

PATH = pathlib.Path(__file__).with_name("real_kv.npz")
SPEC = KVSpec(layers=3, kv_heads=1, head_dim=128, page_tokens=64, dtype=KVDtype.BFLOAT16)
DOCUMENTS, PAGES = 8, 4


def as_bytes(data: bytes) -> np.ndarray:
    """As an array; without pickle an npz holds nothing else."""
    return np.frombuffer(data, np.uint8)


class RealKV:
    """Pages of a model of three layers, put together."""

    def __init__(self, heads: int) -> None:
        """Reads as many documents as the model gets heads, eight at most."""
        self.spec = dataclasses.replace(SPEC, kv_heads=heads)
        self.positions = [page * SPEC.page_tokens for page in range(PAGES)]
        with np.load(PATH, allow_pickle=False) as arrays:
            decoder = GroupDecoder(PageTransforms(SPEC, "exact"), open_decoder())
            self.values: list[dict[Side, torch.Tensor]] = []
            """Of each page, per side ``(layers, page_tokens, kv_heads, head_dim)``."""
            for page in range(PAGES):
                documents = [PageObject(arrays[f"page_{number}_{page}"].tobytes()) for number in range(heads)]
                self.values.append(
                    {side: torch.cat(list(decoder.decode(documents, 0, side)), dim=2) for side in SPEC.sides}
                )
            self.calibrations = {
                layers: widened(Calibration.from_bytes(arrays[f"calibration_{layers}"].tobytes()), heads)
                for layers in (1, 3)
            }
        """By layers of a basis."""

    def transforms(self, tier: str, layers_per_basis: int, device: torch.device | str) -> PageTransforms:
        return PageTransforms(self.spec, tier, [self.calibrations[layers_per_basis]], device)

    def pages(self, transforms: PageTransforms, layers_per_basis: int) -> list[PageObject]:
        """The pages, coded as a server would."""
        digest = self.calibrations[layers_per_basis].digest
        coding = transforms.codings(digest)[0]
        encoder = PageEncoder(bytes(32), transforms, open_encoder(uniform_blocks=True), coding)
        return [
            PageObject(encoder.encode(bytes([number]) * 32, values, position))
            for number, (values, position) in enumerate(zip(self.values, self.positions, strict=True))
        ]


def widened(calibration: Calibration, heads: int) -> Calibration:
    """The calibration of a model of ``heads`` heads, each of which is the one head of ``calibration``."""
    layout = dataclasses.replace(calibration.layout, kv_heads=heads, tp_size=1)
    sides = layout.sides
    return dataclasses.replace(
        calibration,
        layout=layout,
        bases={
            side: tuple(_widened_basis(basis, heads, layout.head_dim) for basis in calibration.bases[side])
            for side in sides
        },
        metrics={side: np.repeat(calibration.metrics[side], heads, axis=1) for side in sides},
        gain_models={side: tuple(GainModel() for _ in calibration.bases[side]) for side in sides},
        tiers={name: _widened_tier(tier, heads) for name, tier in calibration.tiers.items()},
    )


def _widened_basis(basis: Basis, heads: int, head_dim: int) -> Basis:
    """Components of all heads in turn, so that their order is still that of their variance."""
    mean = np.repeat(basis.mean.reshape(-1, 1, head_dim), heads, axis=1).ravel()
    narrow = basis.synthesis.reshape(len(basis.synthesis), -1, head_dim)
    components, layers, _ = narrow.shape
    wide = np.zeros((components, heads, layers, heads, head_dim), np.float16)
    for head in range(heads):
        wide[:, head, :, head] = narrow
    return Basis(mean, wide.reshape(components * heads, -1))


def _widened_tier(tier: Tier, heads: int) -> Tier:
    low_bits = {side: tuple(np.repeat(bits, heads) for bits in blocks) for side, blocks in tier.low_bits.items()}
    return dataclasses.replace(tier, low_bits=low_bits)
