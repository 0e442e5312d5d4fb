"""What the KV of a page looks like, and the canvas its pictures have: pure integers, known before any data."""

from __future__ import annotations

import dataclasses
import enum
import math

from sglang_kvcodec.errors import UnsupportedError

_ALIGN = 64
"""Width and height in multiples of the largest HEVC block: no conformance window, which decoders treat differently."""
_MIN_SIDE = 192
"""The smallest multiple of 64 above NVDEC's lower bound for HEVC, 144."""
_MAX_SIDE = 8192
"""What every hardware HEVC decoder takes."""
MIN_PICTURE_SAMPLES = 48 * 1024
"""Below this a picture takes more layers, so that a decoder's cost per picture does not dominate."""


class Side(enum.Enum):
    """Which tensor of a layer."""

    KEY = "key"
    VALUE = "value"
    LATENT = "latent"


class KVDtype(enum.Enum):
    """Element type of a KV pool: its name in torch, and the fields of the float from the top bit down."""

    BFLOAT16 = ("bfloat16", 8, 7)
    FLOAT16 = ("float16", 5, 10)
    FLOAT8_E4M3 = ("float8_e4m3fn", 4, 3)
    FLOAT8_E5M2 = ("float8_e5m2", 5, 2)

    def __init__(self, torch_name: str, exponent_bits: int, mantissa_bits: int) -> None:
        self.torch_name = torch_name
        self.exponent_bits = exponent_bits
        self.mantissa_bits = mantissa_bits

    @property
    def item_bytes(self) -> int:
        """Bytes per value."""
        return (1 + self.exponent_bits + self.mantissa_bits) // 8

    @classmethod
    def from_torch_name(cls, name: str) -> KVDtype:
        """The dtype called ``name`` (``"bfloat16"``).

        Raises:
            UnsupportedError: a dtype that can't be coded.
        """
        for dtype in cls:
            if dtype.torch_name == name:
                return dtype
        known = ", ".join(dtype.torch_name for dtype in cls)
        raise UnsupportedError(f"a KV cache of {name} can't be coded; {known} can")


@dataclasses.dataclass(frozen=True)
class KVSpec:
    """The KV tensors of one page on one rank.

    A page holds, for each layer and side, a tensor of shape ``(page_tokens, kv_heads, head_dim)``.
    """

    layers: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    dtype: KVDtype
    sides: tuple[Side, ...] = (Side.KEY, Side.VALUE)

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim", "page_tokens"):
            if not 1 <= getattr(self, name) <= 1 << 16:
                raise UnsupportedError(f"{name} of {getattr(self, name)} can't be coded")
        if not self.sides or len(set(self.sides)) != len(self.sides):
            raise UnsupportedError("a page needs one or two different sides")

    @property
    def channels(self) -> int:
        """Values per token, layer and side."""
        return self.kv_heads * self.head_dim

    @property
    def layer_values(self) -> int:
        """Values per page, layer and side."""
        return self.page_tokens * self.channels

    @property
    def page_bytes(self) -> int:
        """Bytes of a page's uncoded KV."""
        return self.layers * len(self.sides) * self.layer_values * self.dtype.item_bytes


@dataclasses.dataclass(frozen=True)
class PictureGeometry:
    """The NV12 canvas of one picture, and where each layer lies on it.

    The canvas is ``(height * 3 // 2, width)`` uint8: ``height`` luma rows, then ``height // 2`` rows of interleaved
    chroma bytes. A picture carries ``layers_per_picture`` layers, a multiple of three: the first two thirds are stacked
    in the luma rows, the last third in the chroma rows. A layer is a matrix of ``layer_rows`` rows of ``width`` bytes:
    its ``(page_tokens, channels)`` values, cut into ``folds`` blocks of ``width`` channels which are stacked, so that
    vertical neighbours are the same channel of successive tokens. What is left over holds 128.
    """

    layers_per_picture: int
    width: int
    height: int
    folds: int
    page_tokens: int
    channels: int

    @property
    def layer_rows(self) -> int:
        """Rows of one layer."""
        return self.folds * self.page_tokens

    @property
    def canvas_shape(self) -> tuple[int, int]:
        """Shape of the uint8 NV12 canvas."""
        return (self.height * 3 // 2, self.width)

    @property
    def picture_bytes(self) -> int:
        """Bytes of the uint8 NV12 canvas."""
        return self.height * 3 // 2 * self.width

    def layer_row_start(self, index: int) -> int:
        """First canvas row of the picture's layer ``index``."""
        in_luma = self.layers_per_picture * 2 // 3
        if index < in_luma:
            return index * self.layer_rows
        return self.height + (index - in_luma) * self.layer_rows


def is_picture_size(width: int, height: int) -> bool:
    """Whether pictures can be so large: luma samples that every hardware HEVC decoder takes, without a crop."""
    return all(_MIN_SIDE <= side <= _MAX_SIDE and side % _ALIGN == 0 for side in (width, height))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def picture_geometry(spec: KVSpec) -> PictureGeometry:
    """The canvas of ``spec``'s pictures: a pure function, part of the format.

    Of the foldings whose canvas holds all values, the one with the smallest canvas wins, then the squarest.
    """
    thirds = max(1, math.ceil(MIN_PICTURE_SAMPLES / (3 * spec.layer_values)))
    thirds = min(thirds, math.ceil(spec.layers / 3))
    best: tuple[int, int, PictureGeometry] | None = None
    for folds in range(1, max(1, spec.channels // 64) + 1):
        width = max(_MIN_SIDE, _round_up(math.ceil(spec.channels / folds), _ALIGN))
        if width * (folds - 1) >= spec.channels and folds > 1:
            continue
        height = max(_MIN_SIDE, _round_up(2 * thirds * folds * spec.page_tokens, _ALIGN))
        if height > _MAX_SIDE:
            break  # it only grows with the folds
        if width > _MAX_SIDE:
            continue
        candidate = (
            width * height,
            abs(width - height),
            PictureGeometry(3 * thirds, width, height, folds, spec.page_tokens, spec.channels),
        )
        if best is None or candidate[:2] < best[:2]:
            best = candidate
    if best is None:
        raise UnsupportedError(
            f"{spec.channels} channels x {spec.page_tokens} tokens fit no picture; use a smaller page size"
        )
    return best[2]


@dataclasses.dataclass(frozen=True)
class ComponentGeometry:
    """The NV12 canvas of a picture of components: the coefficients of a transform, in falling order of variance.

    The canvas is ``(height * 3 // 2, width)`` uint8, as in ``PictureGeometry``. It holds ``components`` values for each
    token of a page, and says nothing of layers. Where each lies: ``transform/components.py``.
    """

    page_tokens: int
    components: int
    width: int
    height: int

    @property
    def canvas_shape(self) -> tuple[int, int]:
        """Shape of the uint8 NV12 canvas."""
        return (self.height * 3 // 2, self.width)

    @property
    def picture_bytes(self) -> int:
        """Bytes of the uint8 NV12 canvas."""
        return self.height * 3 // 2 * self.width


def component_geometry(spec: KVSpec, components: int) -> ComponentGeometry:
    """The smallest canvas for ``components`` values per token of ``spec``'s pages, of those the squarest, then lowest.

    Args:
        spec: of the pages.
        components: how many are kept of the widest layer group: pictures of one object share a size.

    Raises:
        UnsupportedError: no picture is large enough, or there is no component.
    """
    values = spec.page_tokens * components
    if components < 1:
        raise UnsupportedError("a picture needs at least one component")
    best: tuple[int, int, int] | None = None
    for width in range(_MIN_SIDE, _MAX_SIDE + 1, _ALIGN):
        height = max(_MIN_SIDE, _round_up(math.ceil(2 * values / (3 * width)), _ALIGN))
        if height <= _MAX_SIDE:
            candidate = (width * height, abs(width - height), -width)
            best = candidate if best is None else min(best, candidate)
    if best is None:
        raise UnsupportedError(f"{components} components x {spec.page_tokens} tokens fit no picture")
    return ComponentGeometry(spec.page_tokens, components, -best[2], -(best[0] // best[2]))


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers ``[first_layer, first_layer + layers)``, which are coded and fetched together."""

    index: int
    first_layer: int
    layers: int


def layer_groups(spec: KVSpec) -> tuple[LayerGroup, ...]:
    """The layer groups of ``spec`` in order: ``layers_per_picture`` layers each, the last one maybe fewer."""
    step = picture_geometry(spec).layers_per_picture
    return tuple(
        LayerGroup(index, first, min(step, spec.layers - first))
        for index, first in enumerate(range(0, spec.layers, step))
    )
