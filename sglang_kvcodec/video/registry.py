"""The picture codecs of this machine: probed, chosen by name, and never swapped silently for another."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import av

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.video.base import EncoderSource, PictureDecoder, PictureEncoder
from sglang_kvcodec.video.encoder_processes import EncoderProcesses
from sglang_kvcodec.video.software import SoftwareDecoder, SoftwareEncoder, SoftwareEncoders

logger = logging.getLogger(__name__)

AUTO = "auto"


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


@dataclasses.dataclass(frozen=True)
class _Backend:
    """A backend, best first in its list."""

    name: str
    ffmpeg_codec: str
    mode: str

    def status(self, direction: str) -> BackendStatus:
        try:
            codec = av.Codec(self.ffmpeg_codec, self.mode)
        except av.codec.codec.UnknownCodecError:
            return BackendStatus(self.name, direction, False, f"PyAV {av.__version__} has no {self.ffmpeg_codec}")
        return BackendStatus(self.name, direction, True, f"{codec.long_name} in PyAV {av.__version__}")


_ENCODERS: dict[str, tuple[_Backend, Callable[..., PictureEncoder]]] = {
    "software": (_Backend("software", "libx265", "w"), SoftwareEncoder)
}
_DECODERS: dict[str, tuple[_Backend, Callable[[], PictureDecoder]]] = {
    "software": (_Backend("software", "hevc", "r"), SoftwareDecoder)
}


def probe() -> list[BackendStatus]:
    """Every backend, encoders before decoders, in the order in which ``auto`` prefers them."""
    encoders = [backend.status("encode") for backend, _ in _ENCODERS.values()]
    return encoders + [backend.status("decode") for backend, _ in _DECODERS.values()]


def open_encoder(name: str = AUTO, *, uniform_blocks: bool = False) -> PictureEncoder:
    """An encoder for one thread.

    Args:
        name: a backend, or ``auto`` for the best that is available, which is logged.
        uniform_blocks: for pictures of components, whose statistics do not change within a block of 32 x 32.

    Raises:
        ConfigurationError: unknown, or not available here.
    """
    return _ENCODERS[_choose(name, "encode")][1](uniform_blocks=uniform_blocks)


def open_encoders(*, processes: int) -> EncoderSource:
    """What a server encodes with.

    Args:
        processes: that run libx265; 0 to run it on the threads that ask.

    Raises:
        ConfigurationError: not available here.
    """
    _choose(AUTO, "encode")
    return EncoderProcesses(processes) if processes else SoftwareEncoders()


def open_decoder(name: str = AUTO) -> PictureDecoder:
    """A decoder for one thread; see :func:`open_encoder`."""
    return _DECODERS[_choose(name, "decode")][1]()


def _choose(name: str, direction: str) -> str:
    statuses = {status.name: status for status in probe() if status.direction == direction}
    if name == AUTO:
        for status in statuses.values():
            if status.available:
                logger.info("kvcodec will %s pictures with %r: %s", direction, status.name, status.reason)
                return status.name
        reasons = "; ".join(f"{status.name}: {status.reason}" for status in statuses.values())
        raise ConfigurationError(f"nothing here can {direction} pictures ({reasons})")
    if name not in statuses:
        raise ConfigurationError(f"unknown backend {name!r} to {direction} pictures; there are {', '.join(statuses)}")
    if not statuses[name].available:
        raise ConfigurationError(f"backend {name!r} can't {direction} pictures here: {statuses[name].reason}")
    return name
