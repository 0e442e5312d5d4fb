"""What the calibrated tiers cost on a CPU: pack, encode, decode and restore, against x265 and FFmpeg alone.

Both on the same pictures of a model's KV, in CPU seconds of one thread, in one run. Codec alone is the picture encoder
and decoder on canvases that are there already; the whole is page values to page objects and back. ``products`` are the
two products with the basis alone, of the same shapes: what is left when everything else is free.
``python -m benchmarks.bench_tiers --calibration FILE [--model PATH] [--tokens 2048]``, FILE of ``kvcodec calibrate``.
"""

import argparse
import pathlib
import statistics
import time

import torch

from benchmarks.record import record
from sglang_kvcodec.evaluation.text import cut_documents, shipped_texts
from sglang_kvcodec.flow.page_codec import GroupDecoder, PageEncoder
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.spec import layer_groups
from sglang_kvcodec.models import CausalLM
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.video import open_decoder, open_encoder

PAGE_TOKENS = 64
REPOSITORY = pathlib.Path(__file__).parents[1]


def cpu_s(function):
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def pages_of(model, tokens):
    document = cut_documents(shipped_texts("evaluation", ["code"]), model.encode, tokens, 1)[0]
    kv = model.prefill(document.tokens)
    count = tokens // PAGE_TOKENS
    return [
        {side: values[:, i * PAGE_TOKENS : (i + 1) * PAGE_TOKENS].contiguous() for side, values in kv.items()}
        for i in range(count)
    ]


def measure(tier, calibration, spec, pages):
    transforms = PageTransforms(spec, tier, [calibration])
    transform = transforms.get(tier, calibration.digest)
    pictures, decoder = open_encoder("software", uniform_blocks=True), open_decoder("software")
    whole_encoder = PageEncoder(bytes(32), transforms, pictures, transforms.codings(calibration.digest)[0])
    whole_decoder = GroupDecoder(transforms, decoder)
    positions = [index * PAGE_TOKENS for index in range(len(pages))]
    whole_encoder.encode(bytes(32), pages[0], 0)

    objects, encode_s = cpu_s(
        lambda: [
            whole_encoder.encode(index.to_bytes(32, "big"), page, positions[index]) for index, page in enumerate(pages)
        ]
    )
    loaded = [PageObject(data) for data in objects]
    _, decode_s = cpu_s(
        lambda: [whole_decoder.decode(loaded, group.index, side) for group in layer_groups(spec) for side in spec.sides]
    )
    x265_s = ffmpeg_s = products_s = 0.0
    for group in layer_groups(spec):
        layers = slice(group.first_layer, group.first_layer + group.layers)
        for side in spec.sides:
            values = torch.stack([page[side][layers] for page in pages])
            packed = transform.pack(group, side, values, positions)
            canvases = torch.stack([each.canvas for each in packed]).numpy()
            encoded, seconds = cpu_s(lambda canvases=canvases: pictures.encode(canvases))
            x265_s += seconds
            _, seconds = cpu_s(lambda encoded=encoded: decoder.decode(encoded.parameter_sets, encoded.pictures))
            ffmpeg_s += seconds
            products_s += products_cpu_s(group.layers * spec.channels, transform.components(group, side), len(pages))
    return encode_s, x265_s, decode_s, ffmpeg_s, products_s, sum(map(len, objects))


def products_cpu_s(width, components, pages):
    """Of one side of one group: page after page when packing, all pages together when restoring."""
    basis = torch.randn(width, components)
    page, segment = torch.randn(PAGE_TOKENS, width), torch.randn(pages * PAGE_TOKENS, components)
    _, pack_s = cpu_s(lambda: [page @ basis for _ in range(pages)])
    _, restore_s = cpu_s(lambda: segment @ basis.T)
    return pack_s + restore_s


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(REPOSITORY / "tests/models/tiny-code-lm"))
    parser.add_argument("--calibration", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = CausalLM.load(arguments.model)
    spec = model.kv_spec(PAGE_TOKENS)
    calibration = Calibration.from_bytes(arguments.calibration.read_bytes())
    pages = pages_of(model, arguments.tokens)
    uncoded_mb = spec.page_bytes * len(pages) / 1e6
    rows = []
    for tier in calibration.tiers:
        runs = [measure(tier, calibration, spec, pages) for _ in range(arguments.rounds)]
        encode_s, x265_s, decode_s, ffmpeg_s, products_s, coded_bytes = (
            statistics.median(column) for column in zip(*runs, strict=True)
        )
        rows.append(
            {
                "model": pathlib.Path(arguments.model).name,
                "tier": tier,
                "tokens": arguments.tokens,
                "page_tokens": PAGE_TOKENS,
                "threads": 1,
                "rounds": arguments.rounds,
                "ratio_to_bf16": round(uncoded_mb * 1e6 / coded_bytes, 3),
                "encode_mb_per_cpu_s": round(uncoded_mb / encode_s, 1),
                "decode_mb_per_cpu_s": round(uncoded_mb / decode_s, 1),
                "x265_share_of_encoding": round(x265_s / encode_s, 3),
                "ffmpeg_share_of_decoding": round(ffmpeg_s / decode_s, 3),
                "codec_share_of_all": round((x265_s + ffmpeg_s) / (encode_s + decode_s), 3),
                "products_share_of_all": round(products_s / (encode_s + decode_s), 3),
                "codec_share_of_codec_and_products": round((x265_s + ffmpeg_s) / (x265_s + ffmpeg_s + products_s), 3),
            }
        )
        print(rows[-1])
    print(record("tiers", rows))


if __name__ == "__main__":
    main()
