"""``kvcodec bench``: what coding costs a model's accuracy, what it saves, and what fetching gains, on any model.

torch and transformers are imported when a benchmark runs, so that the command works where there are none.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sglang_kvcodec import __version__
from sglang_kvcodec.cli import bench_gantt, bench_ttft
from sglang_kvcodec.cli.output import ProgressBar, prepare_out
from sglang_kvcodec.errors import ConfigurationError

if TYPE_CHECKING:
    from sglang_kvcodec.evaluation.harness import MethodReport, Prompts
    from sglang_kvcodec.evaluation.methods import Method
    from sglang_kvcodec.evaluation.text import Text
    from sglang_kvcodec.models import CausalLM

_RATIO_COLUMNS = {
    "method": "method",
    "ratio_to_bf16": "ratio",
    "bits_per_value": "bits",
    "metadata_bits_per_value": "metadata",
    "key_bits": "K bits",
    "key_ideal_bits": "ideal",
    "key_noise_to_signal": "K noise",
    "value_bits": "V bits",
    "value_ideal_bits": "ideal",
    "value_noise_to_signal": "V noise",
}
_ACCURACY_COLUMNS = {
    "method": "method",
    "ratio_to_bf16": "ratio",
    "bits_per_value": "bits",
    "kl_nats": "KL",
    "kl_standard_error_nats": "+-",
    "perplexity": "perplexity",
    "top1_agreement": "top-1",
    "greedy_agreement_tokens": "greedy",
    "needle_kept_share": "needle",
    "multi_turn_kept_share": "multi-turn",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``bench`` to the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure accuracy, ratio and TTFT of a model",
        description="Measures ways to code the KV of a model.",
    )
    benches = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)

    accuracy = benches.add_parser(
        "accuracy",
        help="what the model says with restored KV, against untouched KV",
        description="Codes the KV of prefixes with every method, and compares what the model says after them with the "
        "restored and the untouched KV: divergence, perplexity, greedy agreement, recall. Writes accuracy.json, "
        "accuracy.csv, layers.csv and accuracy.svg.",
    )
    _add_common(accuracy)
    accuracy.add_argument(
        "--continuation-tokens", metavar="N", type=int, default=512, help="compared after each prefix"
    )
    accuracy.add_argument("--greedy-tokens", metavar="N", type=int, default=256, help="of greedy runs; 0 for none")
    accuracy.add_argument(
        "--needles", metavar="N", type=int, default=8, help="sentences to find in a prefix; 0 for none"
    )
    accuracy.add_argument("--conversations", metavar="N", type=int, default=2, help="of six facts each; 0 for none")
    accuracy.add_argument("--no-picture", action="store_true", help="do without accuracy.svg, and without matplotlib")
    accuracy.set_defaults(run=_run_accuracy)

    ratio = benches.add_parser(
        "ratio",
        help="bytes and bits per value, by layer",
        description="Codes the KV of prefixes with every method: bytes, bits per value by layer and by K and V, and "
        "what an ideal entropy coder would need. Writes ratio.json, ratio.csv and layers.csv.",
    )
    _add_common(ratio)
    ratio.set_defaults(run=_run_ratio)

    bench_ttft.add_parser(benches)
    bench_gantt.add_parser(benches)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", required=True, help="a Hugging Face directory, or a .gguf file")
    parser.add_argument(
        "--text", metavar="FILE", nargs="+", type=pathlib.Path, help="texts to use (default: those that ship)"
    )
    parser.add_argument(
        "--kinds", metavar="A,B", help="which of those that ship: code, prose, chat, languages (default: all in turn)"
    )
    parser.add_argument(
        "--methods", metavar="A,B,C", help="such as high,fp8,kivi@4,cachegen@0.5 (default: all that are known)"
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        nargs="+",
        type=pathlib.Path,
        help="of kvcodec calibrate, one of each rank: for the methods high, balanced and compact",
    )
    parser.add_argument("--documents", metavar="N", type=int, default=4, help="passages (default: %(default)s)")
    parser.add_argument(
        "--prefix-tokens", metavar="N", type=int, default=1024, help="coded of each, whole pages (default: %(default)s)"
    )
    parser.add_argument("--page-tokens", metavar="N", type=int, default=64, help="of a page (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    parser.add_argument("--threads", metavar="N", type=int, help="of torch on the CPU (default: as torch finds)")
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path, help="write results there")


def _run_ratio(arguments: argparse.Namespace) -> int:
    """Measures sizes; 0 when done.

    Raises:
        KVCodecError: it can't be measured as asked.
    """
    _check(arguments, {"--documents": (arguments.documents, 1)})
    need_libraries()
    from sglang_kvcodec.evaluation import report, tables
    from sglang_kvcodec.evaluation.harness import Prompts, measure_ratio
    from sglang_kvcodec.evaluation.text import cut_documents

    out = prepare_out(arguments.out)
    texts = _texts(arguments)
    model, methods = _load(arguments)
    documents = cut_documents(texts, model.encode, arguments.prefix_tokens, arguments.documents)
    prompts = Prompts(documents, arguments.page_tokens, arguments.prefix_tokens)
    reports, settings = _measure(arguments, measure_ratio, model, prompts, methods)
    rows = [found.summary() for found in reports]
    print(tables.table(rows, _RATIO_COLUMNS))
    if out:
        report.write_json(out / "ratio.json", settings, reports)
        tables.write_csv(out / "ratio.csv", rows)
        tables.write_csv(out / "layers.csv", report.layer_rows(reports))
        print(f"written to {out}: ratio.json, ratio.csv, layers.csv")
    return 0


def _run_accuracy(arguments: argparse.Namespace) -> int:
    """Measures accuracy; 0 when done.

    Raises:
        KVCodecError: it can't be measured as asked.
    """
    _check(
        arguments,
        {
            "--documents": (arguments.documents, 1),
            "--continuation-tokens": (arguments.continuation_tokens, 2),
            "--greedy-tokens": (arguments.greedy_tokens, 0),
            "--needles": (arguments.needles, 0),
            "--conversations": (arguments.conversations, 0),
        },
    )
    need_libraries()
    from sglang_kvcodec.evaluation import report, tables
    from sglang_kvcodec.evaluation.harness import Prompts, measure_accuracy
    from sglang_kvcodec.evaluation.text import cut_documents, make_conversations, make_needles

    out = prepare_out(arguments.out)
    if out and not arguments.no_picture:
        tables.check_can_draw()
    texts = _texts(arguments)
    model, methods = _load(arguments)
    length = arguments.prefix_tokens + arguments.continuation_tokens
    talk = [text for text in texts if text.kind == "chat"] or texts
    prompts = Prompts(
        cut_documents(texts, model.encode, length, arguments.documents),
        arguments.page_tokens,
        arguments.prefix_tokens,
        arguments.greedy_tokens,
        make_needles(texts, model.encode, arguments.prefix_tokens, arguments.needles),
        make_conversations(talk, model.encode, arguments.prefix_tokens, arguments.conversations),
    )
    reports, settings = _measure(arguments, measure_accuracy, model, prompts, methods)
    rows = [found.summary() for found in reports]
    print(tables.table(rows, _ACCURACY_COLUMNS))
    for yardstick, ratios in report.equal_divergence(rows).items():
        curves = ", ".join(f"{family} {ratio:.2f}x" for family, ratio in ratios.items())
        print(f"at the divergence of {yardstick}: {curves or 'no curve of another method reaches it'}")
    for words in _what_the_model_cannot(reports[0]):
        print(words)
    if out:
        report.write_json(out / "accuracy.json", settings, reports)
        tables.write_csv(out / "accuracy.csv", rows)
        tables.write_csv(out / "layers.csv", report.layer_rows(reports))
        names = ["accuracy.json", "accuracy.csv", "layers.csv"]
        if not arguments.no_picture:
            report.draw(out / "accuracy.svg", f"{settings['model']}, {len(prompts.documents)} documents", rows)
            names.append("accuracy.svg")
        print(f"written to {out}: {', '.join(names)}")
    return 0


def _check(arguments: argparse.Namespace, least: Mapping[str, tuple[int, int]]) -> None:
    for option, (given, smallest) in least.items():
        if given < smallest:
            raise ConfigurationError(f"{option} must be at least {smallest}")
    if arguments.page_tokens < 1 or arguments.prefix_tokens < 1 or arguments.prefix_tokens % arguments.page_tokens:
        raise ConfigurationError(
            f"--prefix-tokens must be whole pages: a multiple of --page-tokens, {arguments.page_tokens}"
        )
    if arguments.text and arguments.kinds:
        raise ConfigurationError("--kinds chooses among the texts that ship; it can't be given with --text")


def need_libraries() -> None:
    """Refuses to go on without torch and transformers.

    Raises:
        ConfigurationError: with what to install.
    """
    try:
        import sglang_kvcodec.models  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(f'this needs {error.name}: pip install "sglang-kvcodec[bench]"') from error


def set_threads(threads: int | None) -> None:
    """Sets how many threads torch uses on the CPU.

    Raises:
        ConfigurationError: not a number of threads.
    """
    from sglang_kvcodec.models import use_threads

    if threads is not None and threads < 1:
        raise ConfigurationError("--threads must be at least 1")
    if threads:
        use_threads(threads)


def _texts(arguments: argparse.Namespace) -> list[Text]:
    from sglang_kvcodec.evaluation.text import KINDS, read_texts, shipped_texts

    if arguments.text:
        return read_texts(arguments.text)
    kinds = arguments.kinds.split(",") if arguments.kinds else KINDS
    if not set(kinds) <= set(KINDS):
        raise ConfigurationError(f"--kinds {arguments.kinds}: there are {', '.join(KINDS)}")
    return shipped_texts("evaluation", kinds)


def _load(arguments: argparse.Namespace) -> tuple[CausalLM, list[Method]]:
    from sglang_kvcodec.evaluation.methods import MethodContext
    from sglang_kvcodec.evaluation.registry import DEFAULT_METHODS, make_methods
    from sglang_kvcodec.format.calibration import Calibration
    from sglang_kvcodec.format.profile import CALIBRATED_TIERS
    from sglang_kvcodec.models import CausalLM

    set_threads(arguments.threads)
    calibrations = []
    for path in arguments.calibration or ():
        try:
            calibrations.append(Calibration.from_bytes(path.read_bytes()))
        except OSError as error:
            raise ConfigurationError(f"can't read {path}: {error.strerror}") from error
    model = CausalLM.load(arguments.model, arguments.device)
    if arguments.methods:
        names = arguments.methods.split(",")
    else:
        names = [*DEFAULT_METHODS, *(CALIBRATED_TIERS if calibrations else ())]
    spec = model.kv_spec(arguments.page_tokens)
    return model, make_methods(names, MethodContext(spec, model.config, tuple(calibrations)))


def _measure(
    arguments: argparse.Namespace,
    measure: Callable[..., list[MethodReport]],
    model: CausalLM,
    prompts: Prompts,
    methods: list[Method],
) -> tuple[list[MethodReport], dict[str, Any]]:
    """Runs under a progress bar; what was found, and what it was found with."""
    bar = ProgressBar()
    begin_s = time.monotonic()
    try:
        reports = measure(model, prompts, methods, bar)
    finally:
        bar.close()
    spec = model.kv_spec(arguments.page_tokens)
    settings = {
        "version": __version__,
        "model": pathlib.Path(arguments.model).name,
        "model_type": model.config["model_type"],
        "layers": spec.layers,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "kv_dtype": spec.dtype.torch_name,
        "page_tokens": arguments.page_tokens,
        "prefix_tokens": arguments.prefix_tokens,
        "continuation_tokens": getattr(arguments, "continuation_tokens", None),
        "greedy_tokens": prompts.greedy_tokens,
        "documents": [document.name for document in prompts.documents],
        "needles": [needle.name for needle in prompts.needles],
        "conversations": len(prompts.conversations),
        "device": arguments.device,
        "duration_s": round(time.monotonic() - begin_s, 1),
    }
    return reports, settings


def _what_the_model_cannot(report: MethodReport) -> list[str]:
    """Sentences about tasks that the model fails with untouched KV, and whose scores therefore say nothing."""
    scores = (("needle", report.needles), ("multi-turn", report.conversations))
    return [
        f"{name}: this model answers none of {score.asked} questions with untouched KV, so the score says nothing"
        if score.untouched_right == 0
        else f"{name}: with untouched KV this model answers {score.untouched_right} of {score.asked} questions"
        for name, score in scores
        if score is not None
    ]
