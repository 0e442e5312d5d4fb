"""The picture codecs of this machine: probed, chosen by name, and never swapped silently for another."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import TypeVar

import av

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import CodecError, ConfigurationError
from sglang_kvcodec.video.base import DecoderSource, EncoderSource, FrameDecoder, PictureEncoder
from sglang_kvcodec.video.cuda_driver import CudaDriver
from sglang_kvcodec.video.encoder_processes import EncoderProcesses
from sglang_kvcodec.video.nvdec import NvdecDecoders
from sglang_kvcodec.video.nvenc import NvencEncoders
from sglang_kvcodec.video.nvidia import load_library, probe_nvidia
from sglang_kvcodec.video.software import SoftwareDecoder, SoftwareDecoders, SoftwareEncoder, SoftwareEncoders

logger = logging.getLogger(__name__)

AUTO = "auto"
_Source = TypeVar("_Source", DecoderSource, EncoderSource)
_NO_DEVICE = "the KV pool is not on a CUDA device"


@dataclasses.dataclass(frozen=True)
class BackendStatus:
    """What a probe found.

    Attributes:
        name: what the operator writes.
        direction: ``"encode"`` or ``"decode"``.
        available: whether it can be opened here.
        reason: what it is made of, or why it can't be had.
    """

    name: str
    direction: str
    available: bool
    reason: str


def probe(device: int | None = None) -> list[BackendStatus]:
    """Every backend, encoders before decoders, in the order in which ``auto`` prefers them.

    Args:
        device: ordinal of the CUDA device that the KV pool is on; None for a pool in host memory.
    """
    return [
        _nvidia("nvenc", "encode", device),
        _ffmpeg("x265", "encode", "libx265", "w"),
        _nvidia("nvdec", "decode", device),
        _ffmpeg("software", "decode", "hevc", "r"),
    ]


def open_encoders(name: str = AUTO, *, processes: int, device: int | None = None) -> EncoderSource:
    """What a server encodes with.

    Args:
        name: ``nvenc``, ``x265``, or ``auto`` for the best that is available. What is chosen is logged and exported.
        processes: that run libx265; 0 to run it on the threads that ask.
        device: see :func:`probe`.

    Raises:
        ConfigurationError: unknown, or not available here.
    """
    chosen = _choose(name, "encode", device)
    if chosen == "x265":
        return EncoderProcesses(processes) if processes else SoftwareEncoders()
    assert device is not None, "an engine is on a device"
    return _with_nvidia(lambda: NvencEncoders(load_library(), device))


def open_decoders(name: str = AUTO, *, threads: int, device: int | None = None) -> DecoderSource:
    """What a server decodes with; see :func:`open_encoders`.

    Args:
        name: ``nvdec``, ``software``, or ``auto``.
        threads: that will decode, at least.
        device: see :func:`probe`.

    Raises:
        ConfigurationError: unknown, or not available here.
    """
    if _choose(name, "decode", device) == "software":
        return SoftwareDecoders(threads)
    assert device is not None, "an engine is on a device"
    engines = probe_nvidia(device).decode_engines
    return _with_nvidia(lambda: NvdecDecoders(load_library(), CudaDriver(device), engines, threads))


def open_encoder(name: str = AUTO, *, uniform_blocks: bool = False) -> PictureEncoder:
    """libx265 on the caller's thread, whether it is asked for as ``auto``, ``software`` or ``x265``.

    Raises:
        ConfigurationError: unknown, or not available here.
    """
    _check_software(name, "encode")
    return SoftwareEncoder(uniform_blocks=uniform_blocks)


def open_decoder(name: str = AUTO) -> FrameDecoder:
    """FFmpeg's decoder on the caller's thread, whether it is asked for as ``auto`` or ``software``.

    Raises:
        ConfigurationError: unknown, or not available here.
    """
    _check_software(name, "decode")
    return SoftwareDecoder()


def _nvidia(name: str, direction: str, device: int | None) -> BackendStatus:
    if device is None:
        return BackendStatus(name, direction, False, _NO_DEVICE)
    facts = probe_nvidia(device)
    problem = facts.decode_problem if direction == "decode" else facts.encode_problem
    engines = facts.decode_engines if direction == "decode" else facts.encode_engines
    found = f"{engines} engines of {facts.gpu}, CUDA {facts.cuda}, PyNvVideoCodec {facts.library}"
    return BackendStatus(name, direction, not problem, problem or found)


def _ffmpeg(name: str, direction: str, codec_name: str, mode: str) -> BackendStatus:
    try:
        codec = av.Codec(codec_name, mode)
    except av.codec.codec.UnknownCodecError:
        return BackendStatus(name, direction, False, f"PyAV {av.__version__} has no {codec_name}")
    return BackendStatus(name, direction, True, f"{codec.long_name} in PyAV {av.__version__}")


def _choose(name: str, direction: str, device: int | None) -> str:
    statuses = {status.name: status for status in probe(device) if status.direction == direction}
    chosen = None
    if name == AUTO:
        chosen = next((status for status in statuses.values() if status.available), None)
        if chosen is None:
            reasons = "; ".join(f"{status.name}: {status.reason}" for status in statuses.values())
            raise ConfigurationError(f"nothing here can {direction} pictures ({reasons})")
    elif name in statuses:
        chosen = statuses[name]
        if not chosen.available:
            raise ConfigurationError(f"backend {name!r} can't {direction} pictures here: {chosen.reason}")
    else:
        raise ConfigurationError(
            f"unknown backend {name!r} to {direction} pictures; there are {AUTO}, {', '.join(statuses)}"
        )
    others = "; ".join(f"{other.name}: {other.reason}" for other in statuses.values() if not other.available)
    logger.info(
        "kvcodec will %s pictures with %r: %s%s",
        direction,
        chosen.name,
        chosen.reason,
        f" (not available: {others})" if others else "",
    )
    metrics.BACKEND.labels(direction=direction, name=chosen.name).set(1)
    return chosen.name


def _check_software(name: str, direction: str) -> None:
    software = next(
        status for status in probe() if status.direction == direction and status.name in ("x265", "software")
    )
    if name not in (AUTO, "software", software.name):
        raise ConfigurationError(f"unknown backend {name!r} to {direction} pictures on a thread; there is software")
    if not software.available:
        raise ConfigurationError(f"nothing here can {direction} pictures: {software.reason}")


def _with_nvidia(opener: Callable[[], _Source]) -> _Source:
    try:
        return opener()
    except CodecError as error:
        raise ConfigurationError(f"the video engines can't be used: {error}") from error
