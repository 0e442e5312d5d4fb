import pytest
import torch

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.spec import KVDtype, KVSpec, picture_geometry
from sglang_kvcodec.transform.layout import CANVAS_FILL, from_canvas, to_canvas

# layers, kv_heads, head_dim, page_tokens
SHAPES = [
    (3, 2, 128, 64),
    (1, 1, 64, 16),
    (10, 1, 64, 16),
    (7, 2, 80, 48),
    (4, 3, 96, 17),
    (5, 8, 128, 64),
    (2, 32, 256, 16),
    (3, 5, 192, 256),
]


def spec_of(shape):
    return KVSpec(*shape[:4], KVDtype.BFLOAT16)


def documented_place(geometry, layer, token, channel):
    """Row and column of a value on the canvas, word for word from ``PictureGeometry`` and docs/format.md."""
    fold, column = divmod(channel, geometry.width)
    row_in_layer = fold * geometry.page_tokens + token
    layers_in_luma = geometry.layers_per_picture * 2 // 3
    if layer < layers_in_luma:
        return layer * geometry.folds * geometry.page_tokens + row_in_layer, column
    return geometry.height + (layer - layers_in_luma) * geometry.folds * geometry.page_tokens + row_in_layer, column


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("partial", [False, True])
def test_each_value_lies_where_documented(shape, partial):
    spec = spec_of(shape)
    geometry = picture_geometry(spec)
    layers = 1 if partial else geometry.layers_per_picture
    assert geometry.layers_per_picture % 3 == 0
    # Four byte planes of a number that no two values share, so no two axes can be swapped unseen.
    count = layers * spec.layer_values
    unique = torch.arange(count, dtype=torch.int32).view(torch.uint8).reshape(count, 4).T
    planes = unique.reshape(4, layers, spec.page_tokens, spec.channels).contiguous()
    canvases = to_canvas(planes, geometry)
    assert canvases.shape == (4, *geometry.canvas_shape)
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        layer, token, head, dim = (
            int(torch.randint(size, (), generator=generator))
            for size in (layers, spec.page_tokens, spec.kv_heads, spec.head_dim)
        )
        row, column = documented_place(geometry, layer, token, head * spec.head_dim + dim)
        number = ((layer * spec.page_tokens + token) * spec.kv_heads + head) * spec.head_dim + dim
        assert bytes(canvases[:, row, column].tolist()) == number.to_bytes(4, "little")


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_left_over_holds_128_and_only_that(shape):
    spec = spec_of(shape)
    geometry = picture_geometry(spec)
    layers = min(spec.layers, geometry.layers_per_picture)
    planes = torch.zeros((2, layers, spec.page_tokens, spec.channels), dtype=torch.uint8)
    canvases = to_canvas(planes, geometry)
    assert int((canvases == 0).sum()) == planes.numel()
    assert int((canvases == CANVAS_FILL).sum()) == canvases.numel() - planes.numel()


@pytest.mark.parametrize("shape", SHAPES)
def test_from_canvas_is_the_inverse(shape):
    spec = spec_of(shape)
    geometry = picture_geometry(spec)
    for layers in {1, geometry.layers_per_picture}:
        planes = torch.randint(0, 256, (2, layers, spec.page_tokens, spec.channels), dtype=torch.uint8)
        assert torch.equal(from_canvas(to_canvas(planes, geometry), geometry, layers), planes)


def test_a_canvas_of_another_shape_or_type_is_refused():
    geometry = picture_geometry(spec_of(SHAPES[0]))
    height, width = geometry.canvas_shape
    for bad in (
        torch.zeros((1, height, width + 64), dtype=torch.uint8),
        torch.zeros((1, height - 1, width), dtype=torch.uint8),
        torch.zeros((1, height, width), dtype=torch.int16),
    ):
        with pytest.raises(FormatError):
            from_canvas(bad, geometry, 3)
