"""Everything one rank runs for kvcodec, built once and closed together."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

import torch

from sglang_kvcodec import metrics
from sglang_kvcodec.config import ServerConfig
from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.flow.auto_calibration import AutoCalibration
from sglang_kvcodec.flow.bitstream_cache import BitstreamCache
from sglang_kvcodec.flow.fetcher import Fetcher
from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.flow.link_meter import LinkMeter
from sglang_kvcodec.flow.news import News
from sglang_kvcodec.flow.pack_kernel import check_calibrated_pack, pack_kernels
from sglang_kvcodec.flow.page_codec import GroupDecoder, PageEncoder
from sglang_kvcodec.flow.page_packer import DEVICE_CANVASES_BYTES, PagePacker, pack_buffer_bytes
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.prediction import holds_up, restoring_pays
from sglang_kvcodec.flow.prefill_meter import PrefillMeter
from sglang_kvcodec.flow.publisher import Publisher
from sglang_kvcodec.flow.rates import Rates
from sglang_kvcodec.flow.restore_buffers import restore_buffer_bytes
from sglang_kvcodec.flow.restore_kernel import check_calibrated_kernel, restore_kernels
from sglang_kvcodec.flow.restore_meter import RestoreMeter, RestoreModel
from sglang_kvcodec.flow.restorer import SEGMENT_PAGES, Restorer
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.flow.stored_prefix import Tier
from sglang_kvcodec.flow.trace import open_tracer
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.exchange import PeerTransport
from sglang_kvcodec.format.namespace import Namespace
from sglang_kvcodec.format.page_object import PageObject
from sglang_kvcodec.format.profile import EXACT, Coding
from sglang_kvcodec.format.spec import layer_groups
from sglang_kvcodec.rpc.connect import connect
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.video import DecoderSource, EncoderSource, open_decoders, open_encoders

logger = logging.getLogger(__name__)

NewAutoCalibration = Callable[[PeerTransport, Callable[[Calibration], None]], AutoCalibration]
"""Starts one, given where calibrations are kept and what to call with the one to use."""


class Runtime:
    """The flow of one rank, and the namespace its pages are in."""

    def __init__(
        self,
        config: ServerConfig,
        pool: PagedKVPool,
        transforms: PageTransforms,
        calibration: Calibration | None,
        new_namespace: Callable[[], Namespace],
        new_auto_calibration: NewAutoCalibration | None = None,
        pass_tokens: int = 0,
        rank: int = 0,
    ) -> None:
        """Connects and starts the threads; does not wait for the peer.

        Args:
            config: the operator's settings.
            pool: this rank's pool.
            transforms: of the pool's pages and the profile that was asked for.
            calibration: to code with, which ``transforms`` know; None to code without. It is kept when new weights are
                loaded: it then codes them badly, not wrongly.
            new_namespace: computes the namespace of uncalibrated pages from the weights that are loaded now.
            new_auto_calibration: starts to make a calibration; None to stay as it is.
            pass_tokens: of a prompt that one forward pass computes at most; 0 for no bound.
            rank: of this process, for the trace.

        Raises:
            ConfigurationError: a codec or its device's kernel is missing, or the trace can't be written.
        """
        self.config = config
        self.pool = pool
        self._transforms = transforms
        self._calibration_digest = calibration.digest if calibration is not None else b""
        self._coding_of: dict[bytes, Coding] = {}
        """Namespace digest -> how its pages are coded, of old weights as well: some may still be on their way."""
        self._digests: dict[Coding, bytes] = {}
        """The other way round, with the weights that are loaded now."""
        self._new_namespace = new_namespace
        self._namespace: Namespace | None = new_namespace()
        self._weights_changed = False
        self._kernels = restore_kernels(pool, transforms, self._calibration_digest)
        self._packs = (
            pack_kernels(pool, transforms, self._kernels, self._calibration_digest) if not config.read_only else None
        )
        decoders: DecoderSource | None = None
        encoders: EncoderSource | None = None
        if transforms.have_pictures:
            # Refuses here, at start, rather than on a thread later.
            device = _cuda_device(pool)
            decoders = open_decoders(config.decoder, threads=config.decode_threads, device=device)
            if not config.read_only:
                encoders = open_encoders(config.encoder, processes=config.encoder_processes, device=device)
            packs_bytes = 0
            if self._packs is not None:
                takes_device = encoders is not None and encoders.takes_device_canvases
                packs_bytes = pack_buffer_bytes(pool.spec, takes_device_canvases=takes_device)
            sizes = _picture_sizes(transforms, self._calibration_digest)
            try:
                _prepare(decoders, pool, sizes, config, device, packs_bytes)
            except ConfigurationError:
                if encoders is not None:
                    encoders.close()
                raise
        self._decoders, self._encoders = decoders, encoders
        self.tracer = open_tracer(config.trace, f"sglang-kvcodec rank {rank}", rank)
        self.news = News()
        """Of fetches."""
        self.cache = BitstreamCache(config.host_cache_bytes)
        self._peer = connect(config.remote, config.timeouts, config.replicas, config.access)
        decode_threads = decoders.threads if decoders is not None else config.decode_threads
        self.rates = Rates(
            LinkMeter(),
            RestoreMeter(len(layer_groups(pool.spec)), len(pool.spec.sides), SEGMENT_PAGES, decode_threads),
            PrefillMeter(pass_tokens),
        )
        self._monitor = PeerMonitor(self._peer, config.timeouts.retry_s, self.rates.link.round_trip)
        stored = StoredPages()
        self.fetcher = Fetcher(
            self._peer,
            self._monitor,
            self.cache,
            stored,
            transforms,
            config,
            self.rates,
            on_done=self.news.tell,
            tracer=self.tracer,
        )

        def new_decoder() -> GroupDecoder:
            return GroupDecoder(transforms, decoders.decoder() if decoders is not None else None)

        def new_encoder(namespace_digest: bytes) -> PageEncoder:
            coding = self._coding_of[namespace_digest]
            encoder = None
            if encoders is not None and coding.profile.has_pictures:
                encoder = encoders.encoder(uniform_blocks=bool(coding.calibration_digest))
            return PageEncoder(namespace_digest, transforms, encoder, coding)

        self.restorer = Restorer(
            pool,
            new_decoder,
            decode_threads,
            self._kernels,
            self.rates.restore,
            self.tracer,
            config.timeouts.restore_s,
        )
        self._auto_calibration = (
            new_auto_calibration(self._peer, self._now_calibrated) if new_auto_calibration is not None else None
        )
        packer = None
        if self._packs is not None:
            takes_device = encoders is not None and encoders.takes_device_canvases
            room_bytes = DEVICE_CANVASES_BYTES if takes_device else 0
            packer = PagePacker(pool, transforms, self._packs, self._coding_of.__getitem__, room_bytes)
        auto = self._auto_calibration
        self.publisher = Publisher(
            self._peer,
            self._monitor,
            stored,
            pool,
            new_encoder,
            lambda namespace_digest: self._coding_of[namespace_digest].profile_name,
            config,
            on_page=auto.offer if auto is not None else None,
            wants_pages=auto.wants_pages if auto is not None else None,
            packer=packer,
            on_coded=self._keep_coded,
            recall=self._recall_coded,
        )
        for tier in self.tiers():
            _count_from_zero(tier.profile_name)
            profile = self._coding_of[tier.namespace_digests[0]].profile
            logger.info(
                "kvcodec: %s, profile %s (%s), %d layers x %d heads x %d, namespace %s",
                config.remote,
                profile.name,
                profile.promise,
                pool.spec.layers,
                pool.spec.kv_heads,
                pool.spec.head_dim,
                tier.namespace_digests[0].hex()[:16],
            )

    def _keep_coded(self, page_hash: bytes, coded: bytes) -> None:
        """What was just coded comes back from host memory when the device has no room for it any more."""
        self.cache.put(page_hash, PageObject(coded))

    def _recall_coded(self, namespace_digest: bytes, page_hash: bytes) -> bytes | None:
        """What was coded, if it is still there."""
        page = self.cache.get(page_hash)
        return None if page is None or page.key.namespace_digest != namespace_digest else page.to_bytes()

    def restoring_pays(self, pages: Sequence[PageObject]) -> bool:
        """Whether pages in host memory are restored sooner than computed; they are while that is not known."""
        if self.config.plan == "always":
            return True
        restore, prefill = self._restore_model(pages), self.rates.prefill.model(refit=False)
        if restore is None or prefill is None or restore.is_doubted:
            return True
        tokens = len(pages) * self.pool.spec.page_tokens
        return restoring_pays(restore, prefill, len(pages), sum(map(len, pages)), tokens)

    def holds_up(self, pages: Sequence[PageObject], prefix_tokens: int, prompt_tokens: int, are_others: bool) -> bool:
        """Whether a forward pass over the rest of a prompt would wait for these pages for longer than others should.

        Args:
            pages: to be restored.
            prefix_tokens: of the prompt, that are there then.
            prompt_tokens: of the whole prompt.
            are_others: whether somebody would wait with it; then it is too long while nothing is known.
        """
        restore, prefill = self._restore_model(pages), self.rates.prefill.model(refit=False)
        if restore is None or prefill is None:
            return are_others
        coded_bytes = sum(map(len, pages))
        return holds_up(restore, prefill, len(pages), coded_bytes, prefix_tokens, prompt_tokens, are_others)

    def _restore_model(self, pages: Sequence[PageObject]) -> RestoreModel | None:
        """What restoring pages that are coded as the first of these takes; None while that is not known.

        Their headers may not have come yet.
        """
        several = len(self.config.tiers) > 1 and len(pages) > 0
        profile_name = self._coding_of[pages[0].key.namespace_digest].profile_name if several else ""
        return self.rates.restore.model(refit=False, profile_name=profile_name)

    def tiers(self) -> list[Tier]:
        """The tiers that pages are published in now, the best first; none while pages of old weights may be around.

        Each says where its pages may be: first in the namespace that they are published in. A server that makes a
        calibration has published without one before, and so may others have.
        """
        if self._weights_changed:
            return []
        if self._namespace is None:
            self._namespace = self._new_namespace()
            logger.info("kvcodec: new weights, namespace %s without a calibration", self._namespace.digest.hex()[:16])
        # Read once: another thread may set it.
        calibration_digest = self._calibration_digest
        tiers: list[Tier] = []
        for coding in self._transforms.codings(calibration_digest):
            digests = [self._digest_of(self._namespace, coding)]
            if calibration_digest and self.config.auto_calibrate and not tiers:
                digests += [self._digest_of(self._namespace, old) for old in self._transforms.codings()]
            tiers.append(Tier(coding.profile_name, tuple(digests)))
        return tiers

    def _digest_of(self, uncalibrated: Namespace, coding: Coding) -> bytes:
        if coding not in self._digests:
            profile, calibration_digest = coding.profile, coding.calibration_digest
            namespace = dataclasses.replace(
                uncalibrated, profile=profile.name, stages=profile.stages, calibration_digest=calibration_digest.hex()
            )
            self._coding_of[namespace.digest] = coding
            self._digests[coding] = namespace.digest
        return self._digests[coding]

    def _now_calibrated(self, calibration: Calibration) -> None:
        """What is published from now on is coded with it; called on a thread of its own.

        Raises:
            ConfigurationError: its pages can't be packed or restored here by a kernel.
        """
        # Not on the stream that the model is launched on.
        with self.pool.side_stream():
            if self._kernels is not None:
                check_calibrated_kernel(self._kernels, self._transforms, calibration.digest, self.pool)
            if self._packs is not None:
                check_calibrated_pack(self._packs, self._transforms, self._kernels, calibration.digest, self.pool)
        self._calibration_digest = calibration.digest

    def weights_changing(self) -> None:
        """New weights come in: no page is fetched or published until the tree has been flushed."""
        self._weights_changed = True
        if self._auto_calibration is not None:
            # It would be kept under the name of the files that were loaded at start.
            self._auto_calibration.stop()

    def flushed(self) -> None:
        """The tree is empty: what comes now is of the weights that are loaded now."""
        if self._weights_changed:
            # Computed at the next use: at this moment the weights may be offloaded.
            self._namespace = None
            self._digests.clear()
            self._weights_changed = False
            self.cache.clear()

    def close(self) -> None:
        """Ends all threads and the connection."""
        self._monitor.close()
        self._peer.close()
        if self._auto_calibration is not None:
            self._auto_calibration.close()
        self.fetcher.close()
        self.publisher.close()
        if self._encoders is not None:
            self._encoders.close()
        self.restorer.close()
        if self._decoders is not None:
            self._decoders.close()
        self.tracer.close()


def _count_from_zero(tier: str) -> None:
    """Shows what is counted by tier before its first event, which else would be missing from every rate."""
    for counter in (
        *(metrics.FETCHED_BYTES, metrics.RESTORED_TOKENS, metrics.RESTORED_BYTES),
        *(metrics.PUBLISHED_BYTES, metrics.PUBLISHED_KV_BYTES),
    ):
        counter.labels(tier=tier)


def _cuda_device(pool: PagedKVPool) -> int | None:
    """Ordinal of the pool's CUDA device; None for a pool elsewhere."""
    if pool.device.type != "cuda":
        return None
    return torch.cuda.current_device() if pool.device.index is None else pool.device.index


def _prepare(
    decoders: DecoderSource,
    pool: PagedKVPool,
    sizes: Sequence[tuple[int, int]],
    config: ServerConfig,
    device: int | None,
    packs_bytes: int = 0,
) -> None:
    """Warms the decoders, on a GPU as many as fit into the memory that SGLang left to them, and says what that is.

    Args:
        decoders: to warm.
        pool: where pages go.
        sizes: width and height of the pictures to come.
        config: with the bound.
        device: ordinal of the pool's CUDA device; None for a pool elsewhere.
        packs_bytes: of the bound, for what packs pages.

    Raises:
        ConfigurationError: nothing is left for decoders, or they don't work.
    """
    if device is None:
        decoders.prepare(sizes, SEGMENT_PAGES)
        return
    bound_bytes = config.gpu_memory_bytes
    each_bytes = restore_buffer_bytes(pool.spec, SEGMENT_PAGES, from_host=decoders.name == "software")
    if packs_bytes >= bound_bytes:
        raise ConfigurationError(
            f"packing takes up to {packs_bytes >> 20} MiB of the {bound_bytes >> 20} MiB of GPU memory allowed "
            "(--kvcodec-gpu-memory), and nothing is left for decoders"
        )
    decoders.prepare(sizes, SEGMENT_PAGES, most_bytes=bound_bytes - packs_bytes, bytes_beside=each_bytes)
    parts = {
        "bound": bound_bytes,
        "decoders": decoders.used_bytes,
        "restore": decoders.threads * each_bytes,
        "pack": packs_bytes,
    }
    for part, size_bytes in parts.items():
        metrics.GPU_MEMORY_BYTES.labels(part=part).set(size_bytes)
    logger.info(
        "kvcodec: GPU memory: %d decoders took %d MiB, restoring takes up to %d MiB, packing %d MiB; bound %d MiB, "
        "bases not counted",
        decoders.threads,
        parts["decoders"] >> 20,
        parts["restore"] >> 20,
        parts["pack"] >> 20,
        bound_bytes >> 20,
    )


def _picture_sizes(transforms: PageTransforms, calibration_digest: bytes) -> list[tuple[int, int]]:
    """Width and height of the pictures that will be decoded; those of calibrations to come are not known yet."""
    codings = {*transforms.codings(), *transforms.codings(calibration_digest)}
    if calibration_digest:
        codings.add(Coding(EXACT.name))
    shapes = {transforms.get(*coding).canvas_shape for coding in codings if coding.profile.has_pictures}
    return [(width, rows * 2 // 3) for rows, width in sorted(shapes)]
