"""Picture codecs: one interface, several backends."""

from sglang_kvcodec.video.base import (
    Canvases,
    DecodedFrames,
    DecoderSource,
    DeviceCanvases,
    DeviceEncoder,
    EncodedPictures,
    EncoderSource,
    FrameDecoder,
    PictureDecoder,
    PictureEncoder,
)
from sglang_kvcodec.video.registry import (
    AUTO,
    BackendStatus,
    open_decoder,
    open_decoders,
    open_encoder,
    open_encoders,
    probe,
)

__all__ = [
    "AUTO",
    "BackendStatus",
    "Canvases",
    "DecodedFrames",
    "DecoderSource",
    "DeviceCanvases",
    "DeviceEncoder",
    "EncodedPictures",
    "EncoderSource",
    "FrameDecoder",
    "PictureDecoder",
    "PictureEncoder",
    "open_decoder",
    "open_decoders",
    "open_encoder",
    "open_encoders",
    "probe",
]
