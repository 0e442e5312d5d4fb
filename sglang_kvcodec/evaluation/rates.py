"""Rates of a machine and a link, which ``kvcodec doctor`` measures in a few seconds, on made-up pictures and pages."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from sglang_kvcodec.config import Access, Timeouts
from sglang_kvcodec.errors import KVCodecError
from sglang_kvcodec.format.exchange import FetchedFragment, FetchedHeader, PutOutcome
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PageObject, SideData, build_page_object
from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.video import (
    Canvases,
    DecoderSource,
    EncodedPictures,
    EncoderSource,
    PictureDecoder,
    open_decoder,
    open_encoder,
)

PICTURES = 32
"""Of a segment, as a server decodes them."""
_ROUND_TRIPS = 20
_MAX_LINK_BYTES = 128 << 20
_LINK_OBJECT_SPEC = KVSpec(layers=3, kv_heads=8, head_dim=128, page_tokens=64, dtype=KVDtype.BFLOAT16)
_LINK_PART_BYTES = 512 << 10
_GUARD_TIMEOUT_S = 180.0
_TIMEOUTS = Timeouts(connect_s=5.0, lookup_s=10.0, progress_s=20.0)
"""A slow link is what is to be found out, not a reason to give up."""


@dataclasses.dataclass(frozen=True)
class Rate:
    """Of coding pictures.

    Attributes:
        samples_per_s: 8-bit samples in or out.
        coded_bits_per_s: the same, coded.
        pictures_per_s: the same, in pictures.
        bits_per_sample: of these pictures.
        workers: threads or processes that did it.
    """

    samples_per_s: float
    coded_bits_per_s: float
    pictures_per_s: float
    bits_per_sample: float
    workers: int


@dataclasses.dataclass(frozen=True)
class Link:
    """To a peer. Bandwidths are those of one stream, the bytes of objects alone.

    Attributes:
        round_trip_s: median of an RPC that does nothing.
        fetch_bits_per_s: from the peer.
        put_bits_per_s: to the peer, with its storing.
        measured_bytes: that were moved each way.
        peer: its version, engine and fill, in words.
    """

    round_trip_s: float
    fetch_bits_per_s: float
    put_bits_per_s: float
    measured_bytes: int
    peer: str


def noise_pictures(width: int, height: int, bits_per_sample: float, pictures: int = PICTURES) -> Canvases:
    """Canvases ``(pictures, height * 3 // 2, width)`` of rounded Gaussian noise of about such an entropy.

    Its entropy in bits is log2(sigma * sqrt(2 * pi * e)) for a sigma above one half or so.
    """
    sigma = 2**bits_per_sample / math.sqrt(2 * math.pi * math.e)
    values = np.random.default_rng(0).normal(128, sigma, (pictures, height * 3 // 2, width))
    canvases: Canvases = values.round().clip(0, 255).astype(np.uint8)
    return canvases


def encode_rate(
    source: EncoderSource, workers: int, canvases: Canvases, seconds: float
) -> tuple[Rate, EncodedPictures]:
    """How fast ``workers`` threads encode, and the pictures."""
    encoders = [source.encoder(uniform_blocks=True) for _ in range(workers)]
    encoded = encoders[0].encode(canvases)
    works = [functools.partial(encoder.encode, canvases) for encoder in encoders]
    for work in works:
        work()
    rounds, elapsed_s = _rounds(works, seconds)
    return _rate(encoded, canvases, rounds / elapsed_s, workers), encoded


def decode_rate(source: DecoderSource, canvases: Canvases, encoded: EncodedPictures, seconds: float) -> Rate:
    """How fast all decoders that a server would have decode, without a copy to the host.

    Raises:
        CodecError: they can't, or other samples come out.
    """
    rows, width = canvases.shape[1:]
    source.prepare([(width, rows * 2 // 3)], len(canvases))
    decoders = [source.decoder() for _ in range(source.threads)]
    if not np.array_equal(_decode(decoders[0], encoded), canvases):
        raise KVCodecError("what was decoded is not what was encoded")
    works = [functools.partial(decoder.decode_frames, encoded.parameter_sets, encoded.pictures) for decoder in decoders]
    for work in works:
        work()
    rounds, elapsed_s = _rounds(works, seconds)
    return _rate(encoded, canvases, rounds / elapsed_s, source.threads)


def restore_rate(spec: KVSpec, seconds: float) -> float:
    """Values per second that the transform of profile ``exact`` restores on one thread of the host.

    Raises:
        ImportError: there is no torch.
    """
    import torch

    from sglang_kvcodec.flow.page_codec import GroupDecoder, PageEncoder
    from sglang_kvcodec.transform import PageTransforms

    group = layer_groups(spec)[0]
    small = dataclasses.replace(spec, layers=group.layers)
    transforms = PageTransforms(small, "exact")
    encoder, decoder = PageEncoder(bytes(32), transforms, open_encoder()), GroupDecoder(transforms, open_decoder())
    shape = (small.layers, small.page_tokens, small.kv_heads, small.head_dim)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    pages = [PageObject(encoder.encode(bytes(32), dict.fromkeys(small.sides, values)))] * 4
    packed = decoder.unpack(pages, 0, Side.KEY)
    rounds, elapsed_s = _rounds([lambda: decoder.restore(pages, packed, 0, Side.KEY)], seconds)
    return rounds * len(pages) * small.layers * small.layer_values / elapsed_s


def measure_link(remote: str, seconds: float, access: Access) -> Link:
    """Round trips, and bandwidth with objects that are stored under a namespace of their own and deleted again.

    Raises:
        PeerError: the peer can't be reached or does not take them.
        ConfigurationError: not an address, or ``access`` does not go with it.
    """
    peer = GrpcPeer(remote, _TIMEOUTS, access=access)
    namespace = secrets.token_bytes(32)
    stored: list[bytes] = []
    sizes_bytes: list[int] = []
    try:
        peer.wait_until_ready(5.0)
        stat = peer.stat()
        round_trips_s = [_seconds(peer.stat) for _ in range(_ROUND_TRIPS)]

        def put(count: int) -> float:
            objects = [_link_object(namespace) for _ in range(count)]
            stored.extend(page_hash for page_hash, _ in objects)
            sizes_bytes.extend(len(data) for _, data in objects)
            start_s = time.perf_counter()
            outcomes = peer.put(namespace, objects)
            elapsed_s = time.perf_counter() - start_s
            bad = next((result for result in outcomes if result.outcome is not PutOutcome.STORED), None)
            if bad is not None:
                raise KVCodecError(f"the peer did not store a test object: {bad.outcome.value} {bad.detail}")
            return elapsed_s

        object_bytes = len(_link_object(namespace)[1])
        first_s = put(1)
        most = max(1, min(_MAX_LINK_BYTES, stat.capacity_bytes // 4) // object_bytes)
        count = max(1, min(most, int(seconds / first_s)))
        put_s = put(count)
        start_s = time.perf_counter()
        received = 0
        for event in peer.fetch(namespace, stored[1:]):
            if isinstance(event, FetchedHeader):
                received += len(event.header)
            elif isinstance(event, FetchedFragment):
                received += len(event.data)
        fetch_s = time.perf_counter() - start_s
        # They differ by a few bytes, as their checksums do.
        if received != sum(sizes_bytes[1:]):
            raise KVCodecError("the peer did not give back the test objects")
        words = f"{stat.software_version}, {stat.engine}, {stat.stored_bytes >> 20} of {stat.capacity_bytes >> 20} MiB"
        return Link(statistics.median(round_trips_s), 8 * received / fetch_s, 8 * received / put_s, received, words)
    finally:
        try:
            if stored:
                peer.delete(namespace, stored)
        finally:
            peer.close()


def guard_verdict() -> tuple[str, str]:
    """Version of SGLang, and what the guard says against it; empty if nothing, and both empty without SGLang.

    The guard is asked in a process of its own, for SGLang takes long to import and may not import at all.
    """
    code = (
        "import importlib.metadata as m\n"
        "try: print(m.version('sglang'))\n"
        "except m.PackageNotFoundError: raise SystemExit('SGLang is not installed')\n"
        "from sglang_kvcodec.errors import KVCodecError\n"
        "from sglang_kvcodec.plugin.settings import check_version\n"
        "try: check_version()\n"
        "except KVCodecError as error: raise SystemExit(str(error))\n"
    )
    try:
        child = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_GUARD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "", f"SGLang could not be imported in {_GUARD_TIMEOUT_S:g} s"
    version = next(iter(child.stdout.split()), "")
    if child.returncode == 0:
        return version, ""
    return version, (child.stderr.strip().splitlines() or ["the guard ended without a word"])[-1]


def _decode(decoder: PictureDecoder, encoded: EncodedPictures) -> Canvases:
    return decoder.decode(encoded.parameter_sets, encoded.pictures)


def _link_object(namespace: bytes) -> tuple[bytes, bytes]:
    """Hash and bytes of a page object that no compression of the way makes smaller."""
    page_hash = secrets.token_bytes(32)
    side = {side: SideData(stored=secrets.token_bytes(_LINK_PART_BYTES)) for side in _LINK_OBJECT_SPEC.sides}
    groups = [side for _ in layer_groups(_LINK_OBJECT_SPEC)]
    return page_hash, build_page_object(PageKey(namespace, page_hash), _LINK_OBJECT_SPEC, "raw", groups)


def _seconds(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def _rounds(works: Sequence[Callable[[], object]], seconds: float) -> tuple[int, float]:
    """How often the works were done, each on a thread of its own, and in how many seconds."""

    def repeat(work: Callable[[], object]) -> int:
        rounds = 0
        while not rounds or time.perf_counter() < end_s:
            work()
            rounds += 1
        return rounds

    start_s = time.perf_counter()
    end_s = start_s + seconds
    with concurrent.futures.ThreadPoolExecutor(len(works)) as executor:
        rounds = sum(executor.map(repeat, works))
    return rounds, time.perf_counter() - start_s


def _rate(encoded: EncodedPictures, canvases: Canvases, segments_per_s: float, workers: int) -> Rate:
    coded_bits = 8 * sum(map(len, encoded.pictures))
    return Rate(
        canvases.size * segments_per_s,
        coded_bits * segments_per_s,
        len(canvases) * segments_per_s,
        coded_bits / canvases.size,
        workers,
    )
