"""Picture codecs: one interface, several backends."""

from sglang_kvcodec.video.base import Canvases, EncodedPictures, EncoderSource, PictureDecoder, PictureEncoder
from sglang_kvcodec.video.registry import AUTO, BackendStatus, open_decoder, open_encoder, open_encoders, probe

__all__ = [
    "AUTO",
    "BackendStatus",
    "Canvases",
    "EncodedPictures",
    "EncoderSource",
    "PictureDecoder",
    "PictureEncoder",
    "open_decoder",
    "open_encoder",
    "open_encoders",
    "probe",
]
