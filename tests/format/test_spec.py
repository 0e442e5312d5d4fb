import itertools

import pytest

from sglang_kvcodec.errors import UnsupportedError
from sglang_kvcodec.format.spec import MIN_PICTURE_SAMPLES, KVDtype, KVSpec, Side, layer_groups, picture_geometry

SHAPES = [
    (layers, heads, dim, tokens)
    for layers in (1, 2, 3, 4, 7, 10, 36)
    for heads in (1, 2, 3, 8, 32)
    for dim in (64, 80, 96, 128, 192, 256, 576)
    for tokens in (1, 16, 17, 64, 256)
]


@pytest.mark.parametrize("layers", [1, 3, 10, 36])
def test_every_canvas_suits_a_hardware_decoder_and_holds_its_layers(layers):
    for shape in (shape for shape in SHAPES if shape[0] == layers):
        spec = KVSpec(*shape, KVDtype.BFLOAT16)
        geometry = picture_geometry(spec)
        assert geometry.width % 64 == 0
        assert geometry.height % 64 == 0
        assert 192 <= geometry.width <= 8192
        assert 192 <= geometry.height <= 8192
        assert geometry.layers_per_picture % 3 == 0
        assert geometry.folds * geometry.width >= spec.channels
        # No two layers share a row, no layer straddles luma and chroma, none leaves the canvas.
        rows = [
            (geometry.layer_row_start(index), geometry.layer_row_start(index) + geometry.layer_rows)
            for index in range(geometry.layers_per_picture)
        ]
        assert all(stop <= following for (_, stop), (following, _) in itertools.pairwise(rows))
        luma = geometry.layers_per_picture * 2 // 3
        assert rows[luma - 1][1] <= geometry.height
        assert rows[luma][0] == geometry.height
        assert rows[-1][1] <= geometry.canvas_shape[0]


def test_a_picture_takes_layers_until_it_is_worth_a_decode():
    spec = KVSpec(36, 1, 64, 64, KVDtype.BFLOAT16)
    geometry = picture_geometry(spec)
    assert geometry.layers_per_picture * spec.layer_values >= MIN_PICTURE_SAMPLES
    assert (geometry.layers_per_picture - 3) * spec.layer_values < MIN_PICTURE_SAMPLES


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7, 10])
def test_layer_groups_cover_every_layer_once(layers):
    spec = KVSpec(layers, 8, 128, 64, KVDtype.BFLOAT16)
    groups = layer_groups(spec)
    covered = [layer for group in groups for layer in range(group.first_layer, group.first_layer + group.layers)]
    assert covered == list(range(layers))
    assert [group.index for group in groups] == list(range(len(groups)))
    assert all(group.layers == 3 for group in groups[:-1])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (KVSpec(32, 8, 128, 64, KVDtype.BFLOAT16), (3, 512, 256, 2)),
        (KVSpec(32, 1, 128, 64, KVDtype.BFLOAT16), (6, 192, 256, 1)),
        (KVSpec(6, 2, 128, 64, KVDtype.BFLOAT16), (3, 256, 192, 1)),
        (KVSpec(61, 1, 576, 64, KVDtype.BFLOAT16, (Side.LATENT,)), (3, 192, 384, 3)),
    ],
)
def test_the_geometry_of_known_models_never_changes(spec, expected):
    geometry = picture_geometry(spec)
    assert (geometry.layers_per_picture, geometry.width, geometry.height, geometry.folds) == expected


@pytest.mark.parametrize("shape", [(0, 1, 1, 1), (1, -1, 1, 1), (1, 1, 65537, 1), (1, 1, 1, 0)])
def test_shapes_out_of_range_are_unsupported(shape):
    with pytest.raises(UnsupportedError):
        KVSpec(*shape, KVDtype.BFLOAT16)


@pytest.mark.parametrize("sides", [(), (Side.KEY, Side.KEY)])
def test_sides_must_be_there_and_differ(sides):
    with pytest.raises(UnsupportedError, match="side"):
        KVSpec(1, 1, 64, 16, KVDtype.BFLOAT16, sides)


@pytest.mark.parametrize("shape", [(3, 1024, 256, 256), (3, 65536, 65536, 65536), (3, 1, 1, 8192)])
def test_a_page_that_fits_no_picture_is_unsupported(shape):
    with pytest.raises(UnsupportedError, match="smaller page size"):
        picture_geometry(KVSpec(*shape, KVDtype.BFLOAT16))


def test_dtypes_by_their_torch_names():
    assert [KVDtype.from_torch_name(dtype.torch_name) for dtype in KVDtype] == list(KVDtype)
    assert [dtype.item_bytes for dtype in KVDtype] == [2, 2, 1, 1]
    with pytest.raises(UnsupportedError, match="float32 can't be coded"):
        KVDtype.from_torch_name("float32")
