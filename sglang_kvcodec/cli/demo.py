"""A chat that changes between two SGLang servers which share a storage peer, beside a server without kvcodec.

Every part is a process of its own; this one only starts them, talks to them over HTTP and prints what it saw.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import pathlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from rich.console import Console
from rich.table import Table

from sglang_kvcodec.config import PROFILES
from sglang_kvcodec.testing.conversation import first_difference, source_slices
from sglang_kvcodec.testing.machine import describe_machine, gpu_names, versions
from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.testing.processes import KVCodecArgs, SGLangProcess
from sglang_kvcodec.testing.sglang_client import CachedTokens, ChatReply

TINY_MODEL = pathlib.Path(__file__).parents[2] / "tests/models/tiny-code-lm"
FOLLOW_UP_CHARS = 600
WARM_UP_CHARS = 2000
MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of the chat, as the kvcodec server and the server without kvcodec answered it."""

    number: int
    server: str
    prompt_tokens: int
    cached: CachedTokens
    ttft_s: float
    fetched_bytes: int
    restored_bytes: int
    text: str
    plain_ttft_s: float
    plain_text: str

    @property
    def compression_ratio(self) -> float | None:
        """KV bytes of the restored tokens over the bytes that came for them."""
        return self.restored_bytes / self.fetched_bytes if self.fetched_bytes else None


@dataclasses.dataclass(frozen=True)
class Servers:
    """What runs during the demo."""

    peer: PeerProcess
    sharing: tuple[SGLangProcess, ...]
    plain: SGLangProcess


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--model", default=str(TINY_MODEL), help="path or hub name (default: %(default)s)")
    parser.add_argument("--profile", default="exact", choices=PROFILES)
    parser.add_argument("--turns", type=_positive, default=5)
    parser.add_argument("--prompt-tokens", type=_positive, default=2000, help="about how long the first message is")
    parser.add_argument("--answer-tokens", type=_positive, default=48, help="longest answer")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write what was measured to FILE")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


class Demo:
    """Starts everything, holds the chat, ends everything."""

    def __init__(self, options: argparse.Namespace, console: Console, work_dir: pathlib.Path) -> None:
        self._options = options
        self._console = console
        self._work_dir = work_dir

    def run(self) -> list[Turn]:
        """The whole demo; no process is left when it returns or raises."""
        with contextlib.ExitStack() as stack:
            servers = self._start(stack)
            self._warm_up(servers)
            return self._chat(servers)

    def _start(self, stack: contextlib.ExitStack) -> Servers:
        options = self._options
        gpus = len(gpu_names())
        with self._progress("Starting a storage peer"):
            store = f"lmdb:{self._work_dir / 'store'}"
            peer = stack.enter_context(PeerProcess(store, "2GB", arguments=("--log-level", "warning")))
        where = f"GPUs: {gpus}" if gpus else "no GPU: slow"
        with self._progress(f"Starting three SGLang servers ({where})"):
            started = []
            for index, name in enumerate(("A", "B", "plain")):
                kvcodec = None if name == "plain" else KVCodecArgs(peer.remote, options.profile)
                server = SGLangProcess(
                    f"server-{name}",
                    options.model,
                    self._log(f"server-{name}"),
                    kvcodec,
                    on_cpu=not gpus,
                    # Three servers on fewer GPUs have to share their memory.
                    extra_args=("--mem-fraction-static", "0.25") if 0 < gpus < 3 else (),
                    env={"CUDA_VISIBLE_DEVICES": str(index % gpus)} if gpus else None,
                )
                started.append(stack.enter_context(server))
            for server in started:
                server.wait_ready(timeout_s=1800)
        return Servers(peer, (started[0], started[1]), started[2])

    def _warm_up(self, servers: Servers) -> None:
        """Takes the one-time costs of computing, publishing and fetching out of the turns."""
        with self._progress("Warming up"):
            one, other = servers.sharing
            # Each of the two computes a text and fetches one.
            rounds = (("json.decoder", one, other), ("json.encoder", other, one), ("json.decoder", servers.plain))
            for module, *order in rounds:
                (text,) = source_slices([WARM_UP_CHARS], module)
                for server in order:
                    server.client.chat([{"role": "user", "content": text}], max_tokens=8)
                    server.client.wait_published()
            for server in (*servers.sharing, servers.plain):
                server.client.flush_cache()

    def _chat(self, servers: Servers) -> list[Turn]:
        options = self._options
        # Characters that make this many tokens of the first text.
        chars = options.prompt_tokens * 4
        chars = chars * options.prompt_tokens // servers.plain.client.count_tokens(*source_slices([chars]))
        sizes = [chars] + [FOLLOW_UP_CHARS] * (options.turns - 1)
        messages: list[dict[str, str]] = []
        turns: list[Turn] = []
        for number, text in enumerate(source_slices(sizes), start=1):
            server = servers.sharing[(number - 1) % 2]
            messages.append({"role": "user", "content": text})
            with self._progress(f"Turn {number} at {server.name}"):
                turns.append(self._turn(number, server, servers.plain, messages))
            messages.append({"role": "assistant", "content": turns[-1].text})
        return turns

    def _turn(
        self, number: int, server: SGLangProcess, plain: SGLangProcess, messages: Sequence[dict[str, str]]
    ) -> Turn:
        before = server.client.metrics()
        reply = server.client.chat(messages, self._options.answer_tokens)
        after = server.client.metrics()
        if not server.client.wait_published():
            self._console.print(f"{server.name} is still publishing; the next turn may have to compute more")
        plain.client.flush_cache()
        plain_reply: ChatReply = plain.client.chat(messages, self._options.answer_tokens)

        def grown(name: str) -> int:
            return int(after.get(name, 0.0) - before.get(name, 0.0))

        return Turn(
            number=number,
            server=server.name,
            prompt_tokens=reply.prompt_tokens,
            cached=reply.cached,
            ttft_s=reply.ttft_s,
            fetched_bytes=grown("kvcodec_fetched_bytes_total"),
            restored_bytes=grown("kvcodec_restored_bytes_total"),
            text=reply.text,
            plain_ttft_s=plain_reply.ttft_s,
            plain_text=plain_reply.text,
        )

    def _log(self, name: str) -> pathlib.Path:
        return self._work_dir / f"{name}.log"

    @contextlib.contextmanager
    def _progress(self, what: str) -> Iterator[None]:
        """A spinner on a terminal; elsewhere a line at the start and one at the end."""
        started = time.monotonic()
        if self._console.is_terminal:
            with self._console.status(what):
                yield
        else:
            self._console.print(f"{what} …")
            yield
        self._console.print(f"{what}: {time.monotonic() - started:.1f} s")


def turn_table(turns: Sequence[Turn]) -> Table:
    """What a user came to see."""
    table = Table(title="A chat that changes servers", padding=(0, 0), collapse_padding=True)
    headers = (
        *("turn", "server", "prompt\ntokens", "cached:\ndevice", "cached:\nhost", "cached:\nstorage"),
        *("TTFT", "fetched\nMiB", "ratio", "TTFT\nwithout"),
    )
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for turn in turns:
        ratio = turn.compression_ratio
        table.add_row(
            str(turn.number),
            turn.server.removeprefix("server-"),
            str(turn.prompt_tokens),
            *(str(tokens) for tokens in dataclasses.astuple(turn.cached)),
            f"{turn.ttft_s:.2f} s",
            f"{turn.fetched_bytes / MIB:.2f}",
            f"{ratio:.2f}x" if ratio else "-",
            f"{turn.plain_ttft_s:.2f} s",
        )
    table.caption = (
        "cached: prompt tokens that were not computed, by where they came from. ratio: KV bytes of the fetched tokens "
        "over bytes fetched. TTFT without: the same turn at a server without kvcodec, whose cache is "
        "flushed before each turn, since it stands for a server that has not seen the conversation."
    )
    return table


def write_json(path: pathlib.Path, options: argparse.Namespace, turns: Sequence[Turn]) -> None:
    """Everything measured, with what it was measured on."""
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["scripts/demo", *sys.argv[1:]],
        "machine": describe_machine(),
        "versions": versions(),
        "configuration": {name: str(value) for name, value in vars(options).items()},
        "turns": [dataclasses.asdict(turn) | {"compression_ratio": turn.compression_ratio} for turn in turns],
    }
    path.write_text(json.dumps(report, indent=2) + "\n")


def report_words(turns: Sequence[Turn], say: Callable[[str], object]) -> bool:
    """Says whether every word is that of the server without kvcodec, or where the first one differs."""
    for turn in turns:
        if turn.text != turn.plain_text:
            say(
                f"turn {turn.number} differs from the server without kvcodec: "
                + first_difference(turn.text, turn.plain_text)
            )
            return False
    say(f"all {len(turns)} answers are word for word those of the server without kvcodec")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; the exit status."""
    options = parse_args(argv)
    console = Console(highlight=False, soft_wrap=False)
    signal.signal(signal.SIGTERM, _interrupt)
    work_dir = pathlib.Path(tempfile.mkdtemp(prefix="kvcodec-demo-"))
    failed = True
    try:
        turns = Demo(options, console, work_dir).run()
        console.print(turn_table(turns))
        if options.json:
            write_json(options.json, options, turns)
        failed = not report_words(turns, functools.partial(console.print, markup=False))
    except (OSError, RuntimeError) as error:
        console.print(f"error: {error}", markup=False)
    except KeyboardInterrupt:
        console.print("interrupted")
        failed = False
        return 130
    finally:
        if failed:
            console.print(f"logs are in {work_dir}")
        else:
            shutil.rmtree(work_dir)
    return 1 if failed else 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
