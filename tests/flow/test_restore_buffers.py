import dataclasses

from sglang_kvcodec.flow.restore_buffers import restore_buffer_bytes
from sglang_kvcodec.format.spec import KVDtype, KVSpec

MIB = 1 << 20
MODEL = KVSpec(32, 8, 128, 64, KVDtype.BFLOAT16)


def test_codes_of_a_segment_and_side_bytes_are_counted():
    values = 32 * 3 * MODEL.layer_values
    counted = restore_buffer_bytes(MODEL, 32, from_host=False)
    assert 3.5 * values <= counted < 50 * MIB
    assert counted + values <= restore_buffer_bytes(MODEL, 32, from_host=True) + 20 * MIB


def test_what_is_small_takes_whole_blocks_of_torchs_allocator():
    tiny = KVSpec(1, 1, 16, 16, KVDtype.BFLOAT16)
    assert restore_buffer_bytes(tiny, 1, from_host=True) == 22 * MIB


def test_it_grows_with_pages_and_heads():
    sizes = [restore_buffer_bytes(MODEL, pages, from_host=False) for pages in (1, 8, 32, 64)]
    assert sizes == sorted(sizes)
    wide = dataclasses.replace(MODEL, kv_heads=40)
    assert restore_buffer_bytes(wide, 32, from_host=False) > 4 * sizes[2] - 100 * MIB
