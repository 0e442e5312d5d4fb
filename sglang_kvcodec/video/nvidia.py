"""What NVIDIA's video engines on this machine can do, found out in a process of its own.

The process prints the facts as JSON in its last line. It is one of its own because PyNvVideoCodec ends
the one that it is in when the driver can't be initialised, and a hung driver never comes back.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.video.child_environment import child_environment
from sglang_kvcodec.video.cuda_driver import LIBRARY, CudaDriver
from sglang_kvcodec.video.nvdec import Driver, NvdecDecoder
from sglang_kvcodec.video.nvenc import NvencEncoder
from sglang_kvcodec.video.software import SoftwareEncoder

PROBE_TIMEOUT_S = 90.0
"""The first CUDA context on a machine with many GPUs may take tens of seconds."""
PACKAGE = "PyNvVideoCodec"
_TEST_SIZE = (256, 192)
_TEST_PICTURES = 5


@dataclasses.dataclass(frozen=True)
class NvidiaFacts:
    """What was found on one device.

    Attributes:
        gpu: its name; empty if there is none.
        cuda: the newest CUDA that its driver knows.
        library: version of PyNvVideoCodec.
        decode_problem: why it can't decode our pictures; empty if it can.
        decode_engines: that decode.
        decode_limits: what the driver says of HEVC 4:2:0 with 8 bits: ``width_max``, ``mb_num_max`` and so on.
        encode_problem: why it can't encode them; empty if it can.
        encode_engines: that encode.
    """

    gpu: str = ""
    cuda: str = ""
    library: str = ""
    decode_problem: str = ""
    decode_engines: int = 0
    decode_limits: dict[str, int] = dataclasses.field(default_factory=dict)
    encode_problem: str = ""
    encode_engines: int = 0

    @classmethod
    def nothing(cls, problem: str) -> NvidiaFacts:
        """Of a device that can neither decode nor encode."""
        return cls(decode_problem=problem, encode_problem=problem)


@functools.lru_cache
def probe_nvidia(device: int) -> NvidiaFacts:
    """The facts of a CUDA device; asks once, and never takes this process down with it."""
    if importlib.util.find_spec(PACKAGE) is None:
        return NvidiaFacts.nothing(f"{PACKAGE} is not installed")
    try:
        ctypes.CDLL(LIBRARY)
    except OSError as error:
        return NvidiaFacts.nothing(f"there is no NVIDIA driver: {error}")
    return ask_child(child_command(device), PROBE_TIMEOUT_S)


def child_command(device: int) -> list[str]:
    """What runs :func:`main` in a process of its own; not ``-m``, for the package has imported this module by then."""
    code = f"import sys; from {__name__} import run; run(sys.argv[1:])"
    return [sys.executable, "-c", code, str(device)]


def ask_child(command: Sequence[str], timeout_s: float) -> NvidiaFacts:
    """Facts that a process prints as its last line; what it was doing is the problem if it does not get there."""
    try:
        child = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=child_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return NvidiaFacts.nothing(f"the probe of the video engines did not end in {timeout_s:g} s")
    lines = child.stdout.splitlines() or [""]
    try:
        if child.returncode == 0:
            return NvidiaFacts(**json.loads(lines[-1]))
    except (ValueError, TypeError):
        pass
    steps = [line.removesuffix(" ...") for line in lines if line.endswith(" ...")]
    others = [line for line in [*child.stderr.splitlines()[-2:], *lines] if line and not line.endswith(" ...")]
    return NvidiaFacts.nothing(
        f"the probe of the video engines ended with status {child.returncode}"
        f"{' while ' + steps[-1] if steps else ''}: {' | '.join(others[-3:])[:400]}"
    )


def load_library() -> Any:
    """PyNvVideoCodec.

    Raises:
        CodecError: it can't be imported, which needs libraries of the driver.
    """
    try:
        import PyNvVideoCodec
    except (ImportError, RuntimeError, OSError) as error:
        # The wheel appends a page of advice.
        raise CodecError(f"{PACKAGE} can't be imported: {str(error).splitlines()[0]}") from error
    return PyNvVideoCodec


def find_facts(library: Any, driver: Driver, said: Callable[[str], None] = lambda step: None) -> NvidiaFacts:
    """Asks the engines and tries them: what they say is not proof.

    Args:
        library: the module PyNvVideoCodec.
        driver: of the device.
        said: told what is done next.
    """
    # Both queries answer for the first device that is visible, whatever they are asked: a bug of 2.2.
    said("asking for the decoder's limits")
    limits = {name: int(value) for name, value in _decoder_caps(library, driver.device).items()}
    said("asking for the encoder's limits")
    encoder_caps = _caps(lambda: library.GetEncoderCaps(gpuid=driver.device, codec="hevc"))
    width, height = _TEST_SIZE
    shape = (_TEST_PICTURES, height * 3 // 2, width)
    canvases = np.random.default_rng(0).normal(128, 20, shape).round().clip(0, 255).astype(np.uint8)
    said("decoding a test segment")
    decode_problem = "" if limits.get("supported", 1) else "the device does not decode HEVC 4:2:0 with 8 bits"
    if not decode_problem:
        decode_problem = _problem(lambda: _try_decoder(library, driver, canvases))
    said("encoding a test segment")
    encode_problem = "" if encoder_caps.get("support_lossless_encode") else "the device has no engine for lossless HEVC"
    if not encode_problem:
        encode_problem = _problem(lambda: NvencEncoder(library, driver.device).encode(canvases))
    return NvidiaFacts(
        decode_problem=decode_problem,
        decode_engines=limits.get("num_decoder_engines", 0) or 1,
        decode_limits=limits,
        encode_problem=encode_problem,
        encode_engines=encoder_caps.get("num_encoder_engines", 0),
    )


def _decoder_caps(library: Any, device: int) -> dict[str, int]:
    return _caps(
        lambda: library.GetDecoderCaps(
            gpuid=device,
            codec=library.cudaVideoCodec.HEVC,
            chromaformat=getattr(library.cudaVideoChromaFormat, "420"),
            bitdepth=8,
        )
    )


def _caps(ask: Callable[[], dict[str, Any]]) -> dict[str, int]:
    try:
        return {name: int(value) for name, value in ask().items()}
    except Exception as error:
        # An engine that is not there is an exception of the wheel's own. What is not known is tried.
        print(f"no answer: {error}", file=sys.stderr)
        return {}


def _try_decoder(library: Any, driver: Driver, canvases: Any) -> None:
    encoded = SoftwareEncoder().encode(canvases)
    decoder = NvdecDecoder(library, driver)
    for _ in range(2):
        if not np.array_equal(decoder.decode(encoded.parameter_sets, encoded.pictures), canvases):
            raise CodecError("NVDEC gives other samples than were encoded")
    decoder.close()


def _problem(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except CodecError as error:
        return str(error)
    return ""


def main(arguments: Sequence[str]) -> None:
    """Prints the facts of the device whose ordinal is given."""

    def said(step: str) -> None:
        print(f"{step} ...", flush=True)

    said("initialising the driver")
    driver = CudaDriver(int(arguments[0]))
    said(f"importing {PACKAGE}")
    library = load_library()
    facts = find_facts(library, driver, said)
    version = importlib.metadata.version(PACKAGE)
    facts = dataclasses.replace(facts, gpu=driver.device_name, cuda=driver.cuda_version, library=version)
    print(json.dumps(dataclasses.asdict(facts)), flush=True)
    # Destructors of the driver's objects have been seen to hang.
    os._exit(0)


def run(arguments: Sequence[str]) -> None:
    """:func:`main`, with a known problem as one line."""
    try:
        main(arguments)
    except CodecError as problem:
        print(problem, flush=True)
        sys.exit(1)
