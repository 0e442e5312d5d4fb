import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side
from sglang_kvcodec.testing.kv_pool import KnownPool, same_bits
from sglang_kvcodec.testing.synthetic import random_bits


def page_of(gathered, index):
    return {side: values[index] for side, values in gathered.items()}


@pytest.mark.parametrize("dtype", KVDtype)
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 5), (3, 20)])
def test_gather_gives_pages_from_anywhere_bit_for_bit(dtype, kv_heads, head_dim):
    spec = KVSpec(layers=2, kv_heads=kv_heads, head_dim=head_dim, page_tokens=7, dtype=dtype)
    pool = KnownPool(spec, 4)
    before = pool.bits()
    gathered = pool.wrapped.gather(pool.slots([3, 0, 2]))
    for index, page in enumerate([3, 0, 2]):
        assert same_bits(page_of(gathered, index), pool.page(page))
    assert pool.others_are(before, [])


@settings(max_examples=40)
@given(
    spec=st.builds(
        KVSpec,
        layers=st.integers(1, 4),
        kv_heads=st.integers(1, 5),
        head_dim=st.integers(1, 9),
        page_tokens=st.integers(1, 17),
        dtype=st.sampled_from(KVDtype),
        sides=st.sampled_from([(Side.KEY, Side.VALUE), (Side.LATENT,)]),
    ),
    data=st.data(),
)
def test_what_is_scattered_is_gathered_and_nothing_else_is_touched(spec, data):
    pool = KnownPool(spec, 4, seed=data.draw(st.integers(0, 99)))
    pages = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
    first = data.draw(st.integers(0, spec.layers - 1))
    layers = data.draw(st.integers(1, spec.layers - first))
    side = data.draw(st.sampled_from(spec.sides))
    values = random_bits(spec.dtype, (len(pages), layers, spec.page_tokens, spec.kv_heads, spec.head_dim), seed=1)
    slots = pool.slots(pages)
    before, gathered_before = pool.bits(), pool.wrapped.gather(slots)

    with pool.wrapped.writing(side, first, values.shape[1]) as buffers:
        pool.wrapped.write(buffers, values, slots)

    gathered = pool.wrapped.gather(slots)
    expected = {each: tensor.clone() for each, tensor in gathered_before.items()}
    expected[side][:, first : first + layers] = values
    assert same_bits(gathered, expected)
    assert pool.others_are(before, pages)


def test_only_some_of_the_pages():
    spec = KVSpec(layers=3, kv_heads=3, head_dim=5, page_tokens=7, dtype=KVDtype.FLOAT8_E5M2)
    pool = KnownPool(spec, 4)
    gathered = pool.wrapped.gather(pool.slots([2, 0, 3, 1]), only=[1, 3])
    assert same_bits(page_of(gathered, 0), pool.page(0))
    assert same_bits(page_of(gathered, 1), pool.page(1))
    assert all(len(values) == 2 for values in gathered.values())


@pytest.mark.parametrize("dtype", [KVDtype.FLOAT8_E4M3, KVDtype.FLOAT8_E5M2])
def test_a_pool_that_stores_fp8_as_bytes(dtype):
    spec = KVSpec(layers=1, kv_heads=1, head_dim=8, page_tokens=2, dtype=dtype)
    known = KnownPool(spec, 2)
    as_bytes = {side: [layer.view(torch.uint8) for layer in layers] for side, layers in known.buffers.items()}
    pool = PagedKVPool(spec, lambda: as_bytes, torch.device("cpu"))
    gathered = pool.gather(known.slots([1, 0]))
    assert same_bits(page_of(gathered, 0), known.page(1))
    values = gathered[Side.KEY].flip(0)
    with pool.writing(Side.KEY, 0, values.shape[1]) as buffers:
        pool.write(buffers, values, known.slots([1, 0]))
    assert same_bits({Side.KEY: pool.gather(known.slots([1, 0]))[Side.KEY]}, {Side.KEY: values})


def test_the_buffers_are_asked_for_at_each_use():
    spec = KVSpec(layers=1, kv_heads=1, head_dim=4, page_tokens=2, dtype=KVDtype.FLOAT16)
    old, new = KnownPool(spec, 1, seed=1), KnownPool(spec, 1, seed=2)
    holder = {"buffers": old.buffers}
    pool = PagedKVPool(spec, lambda: holder["buffers"], torch.device("cpu"))
    assert same_bits(page_of(pool.gather(old.slots([0])), 0), old.page(0))
    holder["buffers"] = new.buffers
    assert same_bits(page_of(pool.gather(new.slots([0])), 0), new.page(0))
