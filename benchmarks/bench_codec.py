"""Bytes and speed of every profile on real KV, against the uncoded bf16 bytes and zstd -3 of them.

Speeds are bf16 megabytes per second of CPU time, so that a busy machine tells the same as an idle one.

``python benchmarks/bench_codec.py [--tokens 4096] [--model PATH]``
"""

from __future__ import annotations

import argparse
import pathlib
import time

import torch
import zstandard
from record import record
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_kvcodec.flow.page_codec import GroupDecoder, PageEncoder
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.video import open_decoder, open_encoder

REPOSITORY = pathlib.Path(__file__).parent.parent
PAGE_TOKENS = 64
SOURCES = ("argparse", "dataclasses", "typing", "logging")
Page = dict[Side, torch.Tensor]


def source_text() -> str:
    modules = [__import__(name) for name in SOURCES]
    return "\n".join(pathlib.Path(str(module.__file__)).read_text() for module in modules)


def pages_of_model(path: str, tokens: int) -> list[Page]:
    """KV of ``tokens`` tokens of source code, page by page: ``(layers, page_tokens, kv_heads, head_dim)`` bf16."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    ids = AutoTokenizer.from_pretrained(path)(source_text(), return_tensors="pt").input_ids[:, :tokens]
    with torch.inference_mode():
        layers = model(ids, use_cache=True).past_key_values.layers
    keys = torch.stack([layer.keys[0].transpose(0, 1) for layer in layers])
    values = torch.stack([layer.values[0].transpose(0, 1) for layer in layers])
    return [
        {
            Side.KEY: keys[:, at : at + PAGE_TOKENS].contiguous(),
            Side.VALUE: values[:, at : at + PAGE_TOKENS].contiguous(),
        }
        for at in range(0, ids.shape[1] - PAGE_TOKENS + 1, PAGE_TOKENS)
    ]


def noise_to_signal(restored: torch.Tensor, original: torch.Tensor) -> float:
    """Noise over the signal that is left without channel means, ``(pages, layers, tokens, heads, dim)``; the worst."""
    wide = original.double()
    noise = ((restored.double() - wide) ** 2).sum((2, 3, 4))
    return float((noise / ((wide - wide.mean(2, keepdim=True)) ** 2).sum((2, 3, 4))).max())


def measure(profile: str, pages: list[Page], side: Side) -> dict[str, object]:
    layers, tokens, heads, dim = pages[0][side].shape
    spec = KVSpec(layers, heads, dim, tokens, KVDtype.BFLOAT16, (side,))
    coded = profile != "raw"
    encoder = PageEncoder(bytes(32), PageTransforms(spec, profile), open_encoder("software") if coded else None)
    decoder = GroupDecoder(PageTransforms(spec, profile), open_decoder("software") if coded else None)
    encoder.encode(bytes(32), pages[0])

    start = time.process_time()
    objects = [encoder.encode(index.to_bytes(32, "big"), page) for index, page in enumerate(pages)]
    encode_s = time.process_time() - start

    start = time.process_time()
    loaded = [PageObject(data) for data in objects]
    groups = [decoder.decode(loaded, group.index, side) for group in layer_groups(spec)]
    decode_s = time.process_time() - start

    uncoded_bytes = spec.page_bytes * len(pages)
    object_bytes = sum(map(len, objects))
    zstd = zstandard.ZstdCompressor(level=3)
    uncoded = [page[side].view(torch.uint8).numpy().tobytes() for page in pages]
    start = time.process_time()
    zstd_bytes = sum(len(zstd.compress(data)) for data in uncoded)
    zstd_s = time.process_time() - start
    restored, original = torch.cat(groups, 1), torch.stack([page[side] for page in pages])
    return {
        "profile": profile,
        "side": side.value,
        "tokens": tokens * len(pages),
        "bytes_per_token": round(object_bytes / (tokens * len(pages)), 1),
        "bf16_bytes_per_token": uncoded_bytes // (tokens * len(pages)),
        "ratio_to_bf16": round(uncoded_bytes / object_bytes, 3),
        "ratio_to_zstd3": round(zstd_bytes / object_bytes, 3),
        "bits_per_value": round(16 * object_bytes / uncoded_bytes, 3),
        "encode_mb_per_cpu_s": round(uncoded_bytes / encode_s / 1e6, 1),
        "decode_mb_per_cpu_s": round(uncoded_bytes / decode_s / 1e6, 1),
        "zstd3_mb_per_cpu_s": round(uncoded_bytes / zstd_s / 1e6, 1),
        "bit_exact": torch.equal(restored.view(torch.int16), original.view(torch.int16)),
        "worst_noise_to_signal": round(noise_to_signal(restored, original), 7),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(REPOSITORY / "tests/models/tiny-code-lm"))
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pages = pages_of_model(arguments.model, arguments.tokens)
    model = pathlib.Path(arguments.model).name
    rows = [
        {"model": model, "page_tokens": PAGE_TOKENS, "threads": 1, **measure(profile, pages, side)}
        for profile in ("raw", "exact", "high")
        for side in (Side.KEY, Side.VALUE)
    ]
    for row in rows:
        print(row)
    print(record("codec", rows))


if __name__ == "__main__":
    main()
