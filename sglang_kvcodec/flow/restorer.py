"""Decodes page objects and writes them into the pool, layer group by layer group, on threads of its own."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from sglang_kvcodec import metrics
from sglang_kvcodec.errors import KVCodecError
from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.flow.page_codec import GroupDecoder
from sglang_kvcodec.flow.rates import RestoreMeter
from sglang_kvcodec.flow.trace import Tracer
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.spec import KVSpec, LayerGroup, Side, layer_groups
from sglang_kvcodec.kernels import PageRestores
from sglang_kvcodec.transform import PackedSide

logger = logging.getLogger(__name__)

SEGMENT_PAGES = 32
"""Pages per decode call: bounds the decoded planes in memory, and lets several threads share one request."""


@dataclasses.dataclass(frozen=True)
class RestoreJob:
    """Pages of one request and where they go.

    Attributes:
        pages: checked page objects; held until the restore has ended.
        slots: int64 ``(len(pages) * page_tokens,)`` on the pool's device, private to the request until it has ended.
    """

    pages: Sequence[PageObject]
    slots: torch.Tensor


class Restore:
    """The restore of one batch. Calls back on restore threads: layer by layer in order, or once with an error."""

    def __init__(
        self,
        jobs: Sequence[RestoreJob],
        spec: KVSpec,
        parts: int,
        on_layers: Callable[[LayerGroup], None],
        on_failure: Callable[[KVCodecError], None],
    ) -> None:
        """A restore of all layer groups of ``spec``, each in ``parts`` parts."""
        groups = layer_groups(spec)
        self.jobs = jobs
        self.bad_pages: list[PageObject] = []
        self._groups = groups
        self._page_bytes = spec.page_bytes
        self._open_parts = [parts] * len(groups)
        self._announced = 0
        self._open = parts * len(groups)
        self._on_layers = on_layers
        self._on_failure = on_failure
        self._error: KVCodecError | None = None
        self._lock = threading.Lock()

    @property
    def has_failed(self) -> bool:
        """Whether the parts that are left need not be done."""
        return self._error is not None

    def part_done(self, group_index: int, error: KVCodecError | None) -> None:
        """Counts a part, done or not. The failure is told when no thread writes to the slots any more."""
        with self._lock:
            self._open -= 1
            self._open_parts[group_index] -= 1
            if error is not None and self._error is None:
                self._error = error
            has_ended = self._open == 0
            if has_ended and self._error is None:
                metrics.RESTORED_TOKENS.inc(sum(job.slots.numel() for job in self.jobs))
                metrics.RESTORED_BYTES.inc(sum(len(job.pages) for job in self.jobs) * self._page_bytes)
            while (
                self._error is None and self._announced < len(self._groups) and self._open_parts[self._announced] == 0
            ):
                self._on_layers(self._groups[self._announced])
                self._announced += 1
        failure = self._error
        if has_ended and failure is not None:
            metrics.RESTORE_FAILURES.labels(reason=failure.reason).inc()
            self._on_failure(failure)

    def found_bad(self, pages: Sequence[PageObject]) -> None:
        """Remembers pages that could not be decoded."""
        with self._lock:
            self.bad_pages.extend(page for page in pages if page not in self.bad_pages)


class Restorer:
    """Owns the decoding threads, each with a decoder of its own."""

    def __init__(
        self,
        pool: PagedKVPool,
        new_decoder: Callable[[], GroupDecoder],
        threads: int,
        kernels: PageRestores | None = None,
        meter: RestoreMeter | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """Opens nothing yet: a thread opens its decoder when it first needs it.

        Args:
            pool: where pages go.
            new_decoder: opens a decoder for one thread.
            threads: how many.
            kernels: restore on the pool's device; None to restore with the transforms and copy.
            meter: told what there is to do and what each part took.
            tracer: told what the threads do.
        """
        self._pool = pool
        self._kernels = kernels
        self._meter = meter
        self._tracer = tracer or Tracer()
        self._new_decoder = new_decoder
        self._local = threading.local()
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="kvcodec-restore")

    def start(
        self,
        jobs: Sequence[RestoreJob],
        on_layers: Callable[[LayerGroup], None],
        on_failure: Callable[[KVCodecError], None],
        after: Sequence[Any] = (),
    ) -> Restore:
        """Begins to restore; returns at once.

        Args:
            jobs: what goes where, one page at least; no slot twice.
            on_layers: called for each layer group in order, when all its layers are in the pool.
            on_failure: called once instead of what is left, when no slot is written any more.
            after: device events to wait for before a slot is written.
        """
        spec = self._pool.spec
        segments = [
            (job.pages[i : i + SEGMENT_PAGES], job.slots[i * spec.page_tokens : (i + SEGMENT_PAGES) * spec.page_tokens])
            for job in jobs
            for i in range(0, len(job.pages), SEGMENT_PAGES)
        ]
        restore = Restore(jobs, spec, len(segments) * len(spec.sides), on_layers, on_failure)
        if self._meter is not None:
            self._meter.queued(sum(len(page) for job in jobs for page in job.pages))
        for group in layer_groups(spec):
            for pages, slots in segments:
                for side in spec.sides:
                    self._executor.submit(self._restore_part, restore, group, side, pages, slots, after)
        return restore

    def close(self) -> None:
        """Waits for what is under way and ends."""
        self._executor.shutdown(wait=True)

    def _restore_part(
        self,
        restore: Restore,
        group: LayerGroup,
        side: Side,
        pages: Sequence[PageObject],
        slots: torch.Tensor,
        after: Sequence[Any],
    ) -> None:
        error: KVCodecError | None = None
        took_s: float | None = None
        try:
            if not restore.has_failed:
                # Outside of the measurement: a thread opens it once.
                self._decoder()
                start_s = time.monotonic()
                self._decode_and_write(group, side, pages, slots, after)
                took_s = time.monotonic() - start_s
        except KVCodecError as caught:
            logger.error("kvcodec: a restore failed, its requests are computed: %s", caught)
            restore.found_bad(self._unreadable(pages, group, side))
            error = caught
        except Exception as caught:
            # A thread's top: the forward pass waits for this part and must not wait for ever.
            logger.exception("kvcodec: a restore failed, its requests are computed")
            restore.found_bad(pages)
            error = KVCodecError(str(caught))
        restore.part_done(group.index, error)
        # Last: the forward pass does not wait for it.
        if self._meter is not None:
            self._meter.part_ended(sum(map(len, pages)), took_s)

    def _decode_and_write(
        self, group: LayerGroup, side: Side, pages: Sequence[PageObject], slots: torch.Tensor, after: Sequence[Any]
    ) -> None:
        start_s = time.monotonic()
        decoder = self._decoder()
        packed = decoder.unpack(pages, group.index, side)
        decoded_s = time.monotonic()
        metrics.DECODE_SECONDS.observe(decoded_s - start_s)
        of_what = {"group": group.index, "side": side.name, "pages": len(pages)}
        self._tracer.work("decode", start_s, decoded_s, **of_what)
        with self._pool.writing(side, group.first_layer, group.layers, after) as layers:
            if self._kernels is None:
                self._pool.write(layers, decoder.restore(pages, packed, group.index, side), slots)
            else:
                self._write_by_kernels(self._kernels, group, side, pages, packed, slots, layers)
        self._tracer.work("restore", decoded_s, time.monotonic(), **of_what)

    def _write_by_kernels(
        self,
        kernels: PageRestores,
        group: LayerGroup,
        side: Side,
        pages: Sequence[PageObject],
        packed: Sequence[PackedSide],
        slots: torch.Tensor,
        layers: Sequence[torch.Tensor],
    ) -> None:
        """Restores the pages of each coding by its kernel: calibrated ones, and exact ones among them."""
        alike: dict[tuple[str, bytes], list[int]] = {}
        for index, page in enumerate(pages):
            alike.setdefault((page.header.profile_name, page.header.calibration_digest), []).append(index)
        for coding, members in alike.items():
            theirs = slots
            if len(alike) > 1:
                chosen = torch.tensor(members, device=slots.device)
                theirs = slots.view(len(pages), -1)[chosen].reshape(-1)
            kernels.get(*coding).restore(
                group,
                side,
                [packed[index] for index in members],
                [pages[index].header.first_position for index in members],
                theirs,
                layers,
            )

    def _decoder(self) -> GroupDecoder:
        """This thread's."""
        if not hasattr(self._local, "decoder"):
            self._local.decoder = self._new_decoder()
        decoder: GroupDecoder = self._local.decoder
        return decoder

    def _unreadable(self, pages: Sequence[PageObject], group: LayerGroup, side: Side) -> Sequence[PageObject]:
        """Those of a segment's pages that do not decode alone; all of them if each does: one has to be to blame."""
        bad = []
        for page in pages:
            try:
                self._decoder().decode([page], group.index, side)
            except KVCodecError:
                bad.append(page)
        return bad or pages
