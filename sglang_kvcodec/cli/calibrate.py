"""``kvcodec calibrate``: runs a model over text and writes the calibration that its tiers need, to files and a peer.

torch and transformers are imported when it runs, so that the command works where there are none.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import pathlib
from typing import TYPE_CHECKING

from sglang_kvcodec.cli.bench import need_libraries, set_threads
from sglang_kvcodec.cli.output import ProgressBar, prepare_out
from sglang_kvcodec.cli.peer_access import access, add_access_arguments
from sglang_kvcodec.config import Access, Timeouts
from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.rpc.connect import connect

if TYPE_CHECKING:
    from sglang_kvcodec.format.calibration import Calibration

_TIMEOUTS = Timeouts(connect_s=5.0, calibration_s=3600.0)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``calibrate`` to the command."""
    parser = subparsers.add_parser(
        "calibrate",
        help="make the calibration of a model for the tiers high, balanced and compact",
        description="Runs a model over text and writes its calibration: means, bases and steps for the tiers high, "
        "balanced and compact. Servers fetch it from their peer at start. A few minutes for a small model.",
    )
    parser.add_argument("--model", metavar="PATH", required=True, type=pathlib.Path, help="a directory or .gguf file")
    parser.add_argument(
        "--remote", metavar="URL", help="peers that are to have it, grpc://HOST:PORT[,HOST:PORT...]; grpcs: TLS"
    )
    add_access_arguments(parser)
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path, help="write it there, one file for each rank")
    parser.add_argument(
        "--text", metavar="FILE", nargs="+", type=pathlib.Path, help="texts to run over (default: those that ship)"
    )
    parser.add_argument(
        "--profile", metavar="TIERS", help="which tiers, such as high,balanced (default: high,balanced,compact)"
    )
    parser.add_argument("--documents", metavar="N", type=int, default=40, help="passages (default: %(default)s)")
    parser.add_argument(
        "--gradient-documents", metavar="N", type=int, default=16, help="passages to take gradients of (default: 16)"
    )
    parser.add_argument(
        "--search-documents", metavar="N", type=int, default=8, help="passages to search the steps on (default: 8)"
    )
    parser.add_argument("--prefix-tokens", metavar="N", type=int, default=1024, help="coded of each passage")
    parser.add_argument("--continuation-tokens", metavar="N", type=int, default=512, help="compared after each")
    parser.add_argument(
        "--layers-per-block",
        type=int,
        choices=(1, 3),
        default=3,
        help="layers that share a basis: 3 codes smaller, 1 restores faster and is smaller itself (default: 3)",
    )
    parser.add_argument("--tp-size", metavar="N", type=int, default=1, help="of the servers (default: 1)")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    parser.add_argument("--threads", metavar="N", type=int, help="of torch on the CPU")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    """Calibrates; 0 when done.

    Raises:
        KVCodecError: it can't be done as asked.
    """
    if not arguments.out and not arguments.remote:
        raise ConfigurationError("say where the calibration goes: --remote grpc://HOST:PORT, --out DIR, or both")
    if arguments.remote:
        access(arguments).require_fit(arguments.remote)
    need_libraries()
    from sglang_kvcodec.evaluation.calibrate import CalibrationPlan, calibrate
    from sglang_kvcodec.evaluation.text import cut_documents, read_texts, shipped_texts
    from sglang_kvcodec.format.model_files import model_files_digest
    from sglang_kvcodec.format.profile import CALIBRATED_TIERS
    from sglang_kvcodec.models import CausalLM

    plan = CalibrationPlan(
        prefix_tokens=arguments.prefix_tokens,
        continuation_tokens=arguments.continuation_tokens,
        search_documents=arguments.search_documents,
        gradient_documents=arguments.gradient_documents,
        layers_per_block=arguments.layers_per_block,
        tp_size=arguments.tp_size,
        tiers=tuple(arguments.profile.split(",")) if arguments.profile else CALIBRATED_TIERS,
    )
    out = prepare_out(arguments.out)
    set_threads(arguments.threads)
    texts = read_texts(arguments.text) if arguments.text else shipped_texts("calibration")
    files_digest = model_files_digest(arguments.model)
    model = CausalLM.load(arguments.model, arguments.device)
    documents = cut_documents(texts, model.encode, plan.document_tokens, arguments.documents)
    notes = {
        "model": arguments.model.name,
        "texts": sorted({text.name for text in texts}),
        "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    with contextlib.closing(ProgressBar()) as bar:
        calibrations = calibrate(model, files_digest, documents, plan, notes, bar)
    _print(calibrations)
    for calibration in calibrations:
        _keep(calibration, out, arguments.remote, access(arguments))
    return 0


def _print(calibrations: list[Calibration]) -> None:
    first = calibrations[0]
    if first.rope is None:
        print(f"K is coded as it is: {first.notes['rope_kept']}")
    for name, tier in first.tiers.items():
        expected = tier.expected
        print(
            f"{name:9} {expected['bits_per_value']:.2f} bits per value before pictures are coded, divergence "
            f"{expected['divergence_nats']:.2e} of {expected['allowed_divergence_nats']:.2e} nats"
        )


def _keep(calibration: Calibration, out: pathlib.Path | None, remote: str | None, shown: Access) -> None:
    layout, size_mib = calibration.layout, len(calibration.encoded) / (1 << 20)
    rank = f" of rank {layout.tp_rank}" if layout.tp_size > 1 else ""
    print(
        f"calibration {calibration.digest.hex()}{rank}, {size_mib:.1f} MiB, for model {calibration.model_digest.hex()}"
    )
    if out:
        path = out / f"calibration-{layout.tp_rank}-of-{layout.tp_size}.safetensors"
        path.write_bytes(calibration.encoded)
        print(f"written to {path}")
    if remote:
        with contextlib.closing(connect(remote, _TIMEOUTS, access=shown)) as peer:
            peer.put_calibration(calibration.model_digest, calibration.encoded)
        print(f"stored at {remote}")
