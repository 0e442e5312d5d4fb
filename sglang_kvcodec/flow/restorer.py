"""Decodes page objects and writes them into the pool, layer group by layer group, on threads of its own.

Pages may still be arriving: each part begins when the layer group of its pages has landed. One that never will ends the
restore, as a damaged one does.

Where a decoder leaves planes on the pool's GPU, all that follows is queued on the decoder's stream: the digests of the
planes, then the restore, straight from the planes into the slots. So the next segment may be decoded into the same
buffers without waiting. A thread waits on the host for one thing, the result of the digests, and a layer is told with
the events after which it is in the pool, once all its digests hold. Elsewhere a layer is told when it is in the pool.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import heapq
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_kvcodec import metrics
from sglang_kvcodec.config import Timeouts
from sglang_kvcodec.cpus import take_place
from sglang_kvcodec.errors import ArrivalError, KVCodecError, RestoreTimeoutError
from sglang_kvcodec.flow.arriving_page import ArrivingPage, when_all_landed
from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.flow.page_codec import DecodedSegment, GroupDecoder, alike_pages
from sglang_kvcodec.flow.restore import LEAST_PATIENCE_S, PATIENCE, OnLayers, Restore, RestoreJob
from sglang_kvcodec.flow.restore_meter import RestoreMeter
from sglang_kvcodec.flow.streams import DeviceEvent
from sglang_kvcodec.flow.trace import Tracer
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.spec import LayerGroup, Side, layer_groups
from sglang_kvcodec.interpreter import BACKGROUND_TURN
from sglang_kvcodec.kernels import PageRestores
from sglang_kvcodec.transform import PackedSide

if TYPE_CHECKING:
    # Needs Triton.
    from sglang_kvcodec.kernels.planes import Planes

logger = logging.getLogger(__name__)

SEGMENT_PAGES = 32
"""Pages per decode call: bounds decoded planes in memory, lets several threads share one request. A power of two."""
GIVES_WAY = 1 << 40
"""More than there will be restores."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """One side of one layer group of one segment of one job: what a thread does at once.

    Attributes:
        expected_bytes: coded size of the segment's pages, as it was known when the restore began.
    """

    restore: Restore
    group: LayerGroup
    side: Side
    pages: Sequence[PageObject]
    slots: torch.Tensor
    after: Sequence[Any]
    expected_bytes: int


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
        timeout_s: float = Timeouts.restore_s,
    ) -> None:
        """Opens nothing yet: a thread opens its decoder when it first needs it.

        Args:
            pool: where pages go.
            new_decoder: opens a decoder for one thread.
            threads: how many.
            kernels: restore on the pool's device; None to restore with the transforms and copy.
            meter: told what there is to do and what each part took.
            tracer: told what the threads do.
            timeout_s: longest restore of a batch.
        """
        self._timeout_s = timeout_s
        self._pool = pool
        self._kernels = kernels
        self._meter = meter
        self._tracer = tracer or Tracer()
        self._new_decoder = new_decoder
        self._local = threading.local()
        self._lock = threading.Lock()
        self._order = itertools.count()
        self._ready: list[tuple[int, int, int, _Part]] = []
        """A heap: the first restore's parts first, those of its first layers first among them, then in their order.
        Restores that are awaited go before all others."""
        self._in_use: collections.deque[tuple[DeviceEvent, torch.Tensor]] = collections.deque()
        """Slots that queued work still reads: torch's allocator knows nothing of a decoder's stream."""
        self._executor = ThreadPoolExecutor(threads, "kvcodec-restore", take_place)

    def start(
        self,
        jobs: Sequence[RestoreJob],
        on_layers: OnLayers,
        on_failure: Callable[[KVCodecError], None],
        after: Sequence[Any] = (),
        is_awaited: bool = True,
    ) -> Restore:
        """Begins to restore; returns at once.

        Args:
            jobs: what goes where, one page at least; no slot twice.
            on_layers: called for each layer group in order, when it is sound and in the pool or on its way there.
            on_failure: called once instead of what is left, when no slot is written any more.
            after: device events to wait for before a slot is written, or the slots' numbers are read.
            is_awaited: whether a forward pass waits for it; one that nobody waits for gives way to those.
        """
        spec = self._pool.spec
        segments = [
            (job.pages[start:stop], job.slots[start * spec.page_tokens : stop * spec.page_tokens])
            for job in jobs
            for start, stop in _segments(job.pages)
        ]
        sizes = [sum(map(len, pages)) for pages, _ in segments]
        if self._meter is not None:
            self._meter.queued(sum(sizes))
        restore = Restore(
            jobs,
            spec,
            len(segments) * len(spec.sides),
            on_layers,
            on_failure,
            next(self._order) + (0 if is_awaited else GIVES_WAY),
            self._timeout_s,
            self._patience_s(len(segments)),
        )
        for group in layer_groups(spec):
            for (pages, slots), size_bytes in zip(segments, sizes, strict=True):
                parts = [_Part(restore, group, side, pages, slots, after, size_bytes) for side in spec.sides]
                when_all_landed(pages, group.index, functools.partial(self._landed, parts))
        return restore

    def _patience_s(self, segments: int) -> float:
        """How long a restore of so many segments may take that has just been queued; endless where nothing is known."""
        known = self._meter.slowest() if self._meter is not None else None
        if known is None:
            return math.inf
        parts_s = segments * known.parts * known.part_s / known.threads
        return max(LEAST_PATIENCE_S, PATIENCE * (known.queued_s + parts_s))

    def _landed(self, parts: Sequence[_Part], error: KVCodecError | None) -> None:
        """Parts can be restored, or never will."""
        for part in parts:
            if error is None:
                part.restore.landed()
                with self._lock:
                    heapq.heappush(self._ready, (part.restore.number, part.group.index, next(self._order), part))
                    metrics.QUEUED_RESTORE_PARTS.set(len(self._ready))
                try:
                    self._executor.submit(self._restore_next)
                    continue
                except RuntimeError:
                    self._drop_ready()
            else:
                self._part_ended(part, None, error)

    def _restore_next(self) -> None:
        """The part that a forward pass needs first, of those that can be restored."""
        with self._lock:
            part = heapq.heappop(self._ready)[-1] if self._ready else None
            metrics.QUEUED_RESTORE_PARTS.set(len(self._ready))
        if part is not None:
            self._restore_part(part)

    def _drop_ready(self) -> None:
        """No thread is left that would restore them."""
        with self._lock:
            dropped, self._ready = [entry[-1] for entry in self._ready], []
            metrics.QUEUED_RESTORE_PARTS.set(0)
        for part in dropped:
            self._part_ended(part, None, ArrivalError("the server ends"))

    def _part_ended(self, part: _Part, took_s: float | None, error: KVCodecError | None) -> None:
        part.restore.part_done(part.group.index, error)
        # Last: the forward pass does not wait for it.
        if self._meter is not None:
            # Pages that never came have no header.
            profile_name = part.pages[0].header.profile_name if took_s is not None else ""
            self._meter.part_ended(part.expected_bytes, took_s, sum(map(len, part.pages)), profile_name)

    def close(self) -> None:
        """Waits for what is under way and ends."""
        self._executor.shutdown(wait=True)
        for event, _ in self._in_use:
            event.synchronize()
        self._in_use.clear()

    def _restore_part(self, part: _Part) -> None:
        restore, group, side, pages, slots, after = (
            part.restore,
            part.group,
            part.side,
            part.pages,
            part.slots,
            part.after,
        )
        error: KVCodecError | None = None
        blamed: list[PageObject] = []
        took_s: float | None = None
        of_what = {"group": group.index, "side": side.name, "pages": len(pages)}
        try:
            if not restore.has_failed:
                restore.check_time()
                # Outside of the measurement: a thread opens it once.
                decoder = self._decoder()
                start_s = time.monotonic()
                in_memory: Sequence[int] = range(len(pages))
                if self._kernels is not None and decoder.device is not None:
                    self._restore_frames(self._kernels, restore, group, side, pages, slots, after, blamed)
                    in_memory = [i for i, page in enumerate(pages) if not page.header.coding.profile.has_pictures]
                packed = decoder.unpack([pages[i] for i in in_memory], group.index, side)
                decoded_s = time.monotonic()
                metrics.DECODE_SECONDS.observe(decoded_s - start_s)
                self._tracer.work("decode", start_s, decoded_s, **of_what)
                if in_memory:
                    self._write(group, side, pages, in_memory, packed, slots, after)
                    self._tracer.work("restore", decoded_s, time.monotonic(), **of_what)
                took_s = time.monotonic() - start_s
        except RestoreTimeoutError as caught:
            logger.error("kvcodec: its requests are computed: %s", caught)
            error = caught
        except KVCodecError as caught:
            logger.error("kvcodec: a restore failed, its requests are computed: %s", caught)
            restore.found_bad(blamed or self._unreadable(pages, group, side))
            error = caught
        except Exception as caught:
            # A thread's top: the forward pass waits for this part and must not wait for ever.
            logger.exception("kvcodec: a restore failed, its requests are computed")
            restore.found_bad(pages)
            error = KVCodecError(str(caught))
        self._part_ended(part, took_s, error)

    def _write(
        self,
        group: LayerGroup,
        side: Side,
        pages: Sequence[PageObject],
        members: Sequence[int],
        packed: Sequence[PackedSide],
        slots: torch.Tensor,
        after: Sequence[Any],
    ) -> None:
        """Restores what is in host memory of the pages that are ``members``; it is in the pool when it returns."""
        with self._pool.writing(side, group.first_layer, group.layers, after) as layers:
            slots = self._slots_of(members, len(pages), slots)
            pages = [pages[index] for index in members]
            if self._kernels is None:
                self._pool.write(layers, self._decoder().restore(pages, packed, group.index, side), slots)
                return
            for coding, members in alike_pages(pages).items():
                chosen, own_slots = [packed[index] for index in members], self._slots_of(members, len(pages), slots)
                if not coding.profile.has_pictures:
                    # What is not coded has no kernel: it is copied.
                    values = self._decoder().restore([pages[index] for index in members], chosen, group.index, side)
                    self._pool.write(layers, values, own_slots)
                    continue
                positions = [pages[index].header.first_position for index in members]
                self._kernels.get(*coding).restore(group, side, chosen, positions, own_slots, layers)

    def _restore_frames(
        self,
        kernels: PageRestores,
        restore: Restore,
        group: LayerGroup,
        side: Side,
        pages: Sequence[PageObject],
        slots: torch.Tensor,
        after: Sequence[Any],
        blamed: list[PageObject],
    ) -> None:
        """Checks and restores planes where the decoder left them; on return the digests hold and the rest is queued.

        Raises:
            ChecksumError: a picture decoded to other planes; its page is in ``blamed``.
        """
        from sglang_kvcodec.kernels.digest import pictures_differ
        from sglang_kvcodec.kernels.planes import planes_at

        decoder, device = self._decoder(), slots.device
        for segment in decoder.decode_frames(pages, group.index, side):
            frames = segment.frames
            if device.type == "cuda" and device.index != frames.device:
                raise KVCodecError(f"planes on device {frames.device}, the pool on {device}")
            stream = self._pool.stream(frames.stream)
            with BACKGROUND_TURN, stream.working():
                planes = planes_at(frames.luma_addresses, frames.chroma_addresses, frames.pitch_bytes, device)
                digests = [data.picture.plane_digest for data in segment.data if data.picture is not None]
                # Before what waits for the forward pass, so that the result does not.
                differ = stream.read(pictures_differ(planes, frames.width, frames.height, digests))
                stream.wait_for(after)
                try:
                    self._restore_segment(kernels, group, side, pages, segment, slots, planes)
                finally:
                    # After an error too: what was queued before it writes to the slots.
                    event = stream.record()
                    restore.queued(group.index, event)
                    self._keep_until(event, slots)
            wrong = [segment.members[index] for index in differ.wait().nonzero().flatten().tolist()]
            if wrong:
                blamed += [pages[index] for index in wrong]
                raise decoder.digest_mismatch(blamed[0])

    def _restore_segment(
        self,
        kernels: PageRestores,
        group: LayerGroup,
        side: Side,
        pages: Sequence[PageObject],
        segment: DecodedSegment,
        slots: torch.Tensor,
        planes: Planes,
    ) -> None:
        """Queues the restore of the pages of a segment, whose planes are given, on the current stream."""
        from sglang_kvcodec.kernels.planes import planes_at

        frames = segment.frames
        layers = self._pool.layers(side, group.first_layer, group.layers)
        alike = alike_pages([pages[index] for index in segment.members])
        for coding, inside in alike.items():
            members = [segment.members[index] for index in inside]
            chosen = np.array(inside)
            kernels.get(*coding).restore(
                group,
                side,
                [
                    PackedSide(None, data.stored, data.escapes, data.picture.steps if data.picture else ())
                    for data in (segment.data[index] for index in inside)
                ],
                [pages[index].header.first_position for index in members],
                self._slots_of(members, len(pages), slots),
                layers,
                planes
                if len(alike) == 1
                else planes_at(
                    frames.luma_addresses[chosen], frames.chroma_addresses[chosen], frames.pitch_bytes, slots.device
                ),
            )

    def _slots_of(self, members: Sequence[int], pages: int, slots: torch.Tensor) -> torch.Tensor:
        """The slots of some of the pages that ``slots`` belong to; on a device, on the current stream."""
        if len(members) == pages:
            return slots
        rows = slots.view(pages, -1)
        return torch.cat([rows[index] for index in members])

    def _keep_until(self, event: DeviceEvent, slots: torch.Tensor) -> None:
        self._in_use.append((event, slots))
        while self._in_use:
            try:
                oldest = self._in_use.popleft()
            except IndexError:
                return
            if not oldest[0].query():
                self._in_use.appendleft(oldest)
                return

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


def _segments(pages: Sequence[PageObject]) -> Iterator[tuple[int, int]]:
    """Where segments start and stop. Pages that arrive, the last ones, begin one: they are fetched in such blocks."""
    landed = next((index for index, page in enumerate(pages) if isinstance(page, ArrivingPage)), len(pages))
    for first, end in ((0, landed), (landed, len(pages))):
        for start in range(first, end, SEGMENT_PAGES):
            yield start, min(start + SEGMENT_PAGES, end)
