import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kvcodec.errors import FormatError, UnsupportedError
from sglang_kvcodec.format.spec import KVDtype, KVSpec, component_geometry
from sglang_kvcodec.transform.components import component_layout, components_from_canvas, components_to_canvas
from sglang_kvcodec.transform.layout import CANVAS_FILL

# page_tokens, components: 3 layers x 2 x 128, 8B, a TP shard, layers left over, one, primes, heads of 80
SHAPES = [(64, 768), (64, 3072), (64, 1152), (64, 384), (64, 128), (1, 1), (17, 257), (48, 480), (32, 768), (256, 1536)]


def geometry_of(tokens, components):
    return component_geometry(KVSpec(3, 2, 128, tokens, KVDtype.BFLOAT16), components)


def documented_order(width, height):
    """Canvas bytes in order, word for word from the module's description."""
    values, guards = [], []
    for planes, block in (((0,), 32), ((1, 2), 16)):
        plane_width, plane_height = (width, height) if block == 32 else (width // 2, height // 2)
        plane_guards = []
        for top in range(0, plane_height, block):
            for left in range(0, plane_width, block):
                for plane in planes:
                    groups = [(y, x) for y in range(0, block, 4) for x in range(0, block, 4)]
                    for group_y, group_x in sorted(groups, key=lambda at: (at[0] + at[1], -at[0])):
                        is_guard = (top == 0 and (group_y, group_x) == (0, block - 4)) or (
                            left == 0 and (group_y, group_x) == (block - 4, 0)
                        )
                        for sample in range(16):
                            y, x = top + group_y + sample // 4, left + group_x + sample % 4
                            place = (y, x) if plane == 0 else (height + y, 2 * x + plane - 1)
                            (plane_guards if is_guard else values).append(place[0] * width + place[1])
        guards += plane_guards
    return values + guards


@pytest.mark.parametrize(("tokens", "components"), SHAPES)
def test_each_value_lies_where_documented(tokens, components):
    geometry = geometry_of(tokens, components)
    order = documented_order(geometry.width, geometry.height)
    assert sorted(order) == list(range(geometry.picture_bytes))
    layout = component_layout(geometry)
    assert layout.shape == (components, tokens)
    assert layout.flatten().tolist() == order[: components * tokens]


@settings(max_examples=25)
@given(tokens=st.integers(1, 300), components=st.integers(1, 900), kept=st.integers(0, 900), seed=st.integers(0, 99))
def test_a_canvas_gives_back_its_components(tokens, components, kept, seed):
    geometry = geometry_of(tokens, components)
    kept = min(kept, components)
    layout = component_layout(geometry)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (2, tokens, kept), generator=generator, dtype=torch.uint8)
    canvases = components_to_canvas(codes, geometry, layout)
    assert canvases.shape == (2, *geometry.canvas_shape)
    assert canvases.is_contiguous()
    assert torch.equal(components_from_canvas(canvases, geometry, layout, kept), codes)
    left_over = torch.ones(geometry.picture_bytes, dtype=torch.bool)
    left_over[layout[:kept].flatten()] = False
    assert int(left_over.sum()) == geometry.picture_bytes - kept * tokens
    assert bool((canvases.flatten(1)[:, left_over] == CANVAS_FILL).all())


@settings(max_examples=25)
@given(tokens=st.integers(1, 512), components=st.integers(1, 20000))
def test_a_canvas_is_the_smallest_that_decoders_take(tokens, components):
    geometry = geometry_of(tokens, components)
    values = tokens * components
    assert geometry.picture_bytes >= values
    for side in (geometry.width, geometry.height):
        assert side % 64 == 0
        assert 192 <= side <= 8192
    smaller = geometry.picture_bytes - 64 * 64 * 3 // 2
    if smaller >= values:
        sides = range(192, 8192 + 1, 64)
        best = min(w * h for w in sides for h in (next((h for h in sides if w * h * 3 // 2 >= values), None),) if h)
        assert geometry.width * geometry.height == best


@pytest.mark.parametrize(
    ("tokens", "components", "width", "height"),
    [(64, 768, 192, 192), (64, 3072, 512, 256), (64, 1152, 256, 192), (1, 1, 192, 192), (256, 3072, 1024, 512)],
)
def test_known_canvases(tokens, components, width, height):
    geometry = geometry_of(tokens, components)
    assert (geometry.width, geometry.height) == (width, height)


@pytest.mark.parametrize("components", [0, -1, 8192 * 8192])
def test_what_fits_no_picture_is_refused(components):
    with pytest.raises(UnsupportedError):
        geometry_of(64, components)


def test_a_canvas_that_is_none_is_refused():
    geometry = geometry_of(17, 257)
    layout = component_layout(geometry)
    canvases = torch.zeros(1, *geometry.canvas_shape, dtype=torch.uint8)
    with pytest.raises(FormatError):
        components_from_canvas(canvases[:, 1:], geometry, layout, 257)
    with pytest.raises(FormatError):
        components_from_canvas(canvases.to(torch.int16), geometry, layout, 257)
    with pytest.raises(FormatError):
        components_from_canvas(canvases, geometry, layout, 258)
