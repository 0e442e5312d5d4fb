"""The examination behind ``kvcodec doctor``: probes, measurements, and what follows from them."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
from typing import Any

from sglang_kvcodec import __version__
from sglang_kvcodec.config import Access, parse_remotes
from sglang_kvcodec.errors import ConfigurationError, KVCodecError
from sglang_kvcodec.evaluation import rates
from sglang_kvcodec.evaluation.break_even import break_even, spec_of_model
from sglang_kvcodec.format.spec import KVDtype, KVSpec, picture_geometry
from sglang_kvcodec.video import open_decoders, open_encoders, probe
from sglang_kvcodec.video.cuda_driver import LIBRARY
from sglang_kvcodec.video.nvdec import reserved_bytes
from sglang_kvcodec.video.nvidia import probe_nvidia

_LARGE_MODEL = KVSpec(layers=32, kv_heads=8, head_dim=128, page_tokens=64, dtype=KVDtype.BFLOAT16)
"""Pictures of this shape are coded where no model is given."""


def examine(arguments: argparse.Namespace, access: Access) -> dict[str, Any]:
    """All findings, ready for JSON. ``reasons`` are those for which a server would not start.

    ``access`` is what the peer that ``arguments`` name is shown.
    """
    reasons: list[str] = []
    notes: list[str] = []
    spec = dataclasses.replace(_LARGE_MODEL, page_tokens=arguments.page_size)
    model: KVSpec | None = None
    if arguments.model is not None:
        try:
            spec = model = spec_of_model(arguments.model, arguments.page_size, arguments.tp_size)
        except ConfigurationError as error:
            notes.append(str(error))
    geometry = picture_geometry(spec)
    sglang_version, against = rates.guard_verdict()
    if against:
        reasons.append(against)
    device = arguments.device if _has_driver() else None
    facts = probe_nvidia(arguments.device)
    findings: dict[str, Any] = {
        "kvcodec": __version__,
        "sglang": {"version": sglang_version or None, "guard": against or "accepted"},
        "video_engines": dataclasses.asdict(facts) | {"device": device},
        "backends": [dataclasses.asdict(status) for status in probe(device)],
        "pictures": {"width": geometry.width, "height": geometry.height, "per_segment": rates.PICTURES},
    }
    if device is None:
        notes.append(f"without an NVIDIA driver ({LIBRARY}) pages are decoded and restored on the CPU")
    decode = _coding(arguments, device, findings, reasons)
    restore_values_per_s = _restoring(spec, arguments, findings, notes)
    link = _link(arguments, access, findings, notes)
    if decode is not None and model is not None:
        values_per_token = model.layers * len(model.sides) * model.channels
        result = break_even(
            values_per_token,
            decode.bits_per_sample,
            decode.samples_per_s,
            restore_values_per_s if device is None else None,
            link.fetch_bits_per_s if link is not None else None,
            link.round_trip_s if link is not None else 0.0,
            arguments.prefill_tokens_per_s,
        )
        findings["break_even"] = dataclasses.asdict(result) | {"bits_per_value": decode.bits_per_sample}
        if device is not None:
            notes.append("the restore kernel's rate is not in the break-even; benchmarks/gpu measures it")
    elif model is None:
        notes.append("no break-even without --model")
    return findings | {"notes": notes, "reasons": reasons, "would_start": not reasons}


def _has_driver() -> bool:
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


def _coding(
    arguments: argparse.Namespace, device: int | None, findings: dict[str, Any], reasons: list[str]
) -> rates.Rate | None:
    """Measures encoder and decoder; the decoder's rate."""
    pictures = findings["pictures"]
    size = (pictures["width"], pictures["height"])
    canvases = rates.noise_pictures(*size, arguments.bits_per_value)
    try:
        encoders = open_encoders(arguments.encoder, processes=arguments.encoder_processes, device=device)
    except KVCodecError as error:
        reasons.append(str(error))
        return None
    try:
        workers = max(1, arguments.encoder_processes)
        rate, encoded = rates.encode_rate(encoders, workers, canvases, arguments.seconds)
        findings["encode"] = {"backend": encoders.name} | dataclasses.asdict(rate)
    except KVCodecError as error:
        reasons.append(f"encoding fails: {error}")
        return None
    finally:
        encoders.close()
    try:
        decoders = open_decoders(arguments.decoder, threads=arguments.decode_threads, device=device)
        try:
            decoded = rates.decode_rate(decoders, canvases, encoded, arguments.seconds)
        finally:
            decoders.close()
    except KVCodecError as error:
        reasons.append(f"decoding fails: {error}")
        return None
    findings["decode"] = {"backend": decoders.name} | dataclasses.asdict(decoded)
    if decoders.name == "nvdec":
        findings["decode"]["reserve_bytes"] = reserved_bytes([size], rates.PICTURES, decoders.threads)
    return decoded


def _restoring(spec: KVSpec, arguments: argparse.Namespace, findings: dict[str, Any], notes: list[str]) -> float | None:
    try:
        one_thread = rates.restore_rate(spec, arguments.seconds)
    except ImportError as error:
        notes.append(f"nothing can be restored here, as on a machine for a peer: {error}")
        return None
    findings["restore"] = {"where": "host", "profile": "exact", "values_per_s_per_thread": one_thread}
    threads: int = arguments.decode_threads
    return one_thread * threads


def _link(
    arguments: argparse.Namespace, access: Access, findings: dict[str, Any], notes: list[str]
) -> rates.Link | None:
    if arguments.remote is None:
        notes.append("no link was measured without --remote")
        return None
    scheme = arguments.remote.partition("://")[0]
    links: list[tuple[str, rates.Link]] = []
    for address in parse_remotes(arguments.remote):
        remote = f"{scheme}://{address}"
        try:
            links.append((remote, rates.measure_link(remote, arguments.seconds, access)))
        except ConfigurationError:
            raise
        except KVCodecError as error:
            # A server starts without its peer, and waits for it in the background.
            notes.append(f"the peer {address} can't be used now: {error}")
    if not links:
        return None
    findings["links"] = [{"remote": remote} | dataclasses.asdict(link) for remote, link in links]
    # What several carry together is not measured: the slowest is what a server has at least.
    return min((link for _, link in links), key=lambda link: link.fetch_bits_per_s)
