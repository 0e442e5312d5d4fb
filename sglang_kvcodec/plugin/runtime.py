"""Everything one rank runs for kvcodec, built once and closed together."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable

from sglang_kvcodec.config import ServerConfig
from sglang_kvcodec.flow.bitstream_cache import BitstreamCache
from sglang_kvcodec.flow.fetcher import Fetcher
from sglang_kvcodec.flow.kv_pool import PagedKVPool
from sglang_kvcodec.flow.page_codec import GroupDecoder, PageEncoder
from sglang_kvcodec.flow.peer_monitor import PeerMonitor
from sglang_kvcodec.flow.publisher import Publisher
from sglang_kvcodec.flow.restore_kernel import restore_kernel
from sglang_kvcodec.flow.restorer import Restorer
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.format.calibration import Calibration
from sglang_kvcodec.format.namespace import Namespace
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.video import open_decoder, open_encoder

logger = logging.getLogger(__name__)


class Runtime:
    """The flow of one rank, and the namespace its pages are in."""

    def __init__(
        self,
        config: ServerConfig,
        pool: PagedKVPool,
        transforms: PageTransforms,
        calibration: Calibration | None,
        new_namespace: Callable[[], Namespace],
    ) -> None:
        """Connects and starts the threads; does not wait for the peer.

        Args:
            config: the operator's settings.
            pool: this rank's pool.
            transforms: of the pool's pages and the profile that was asked for.
            calibration: to code with, which ``transforms`` know; None to code without. It is kept when new weights are
                loaded: it then codes them badly, not wrongly.
            new_namespace: computes the namespace of uncalibrated pages from the weights that are loaded now.

        Raises:
            ConfigurationError: a codec or its device's kernel is missing.
        """
        self.config = config
        self.pool = pool
        self._transforms = transforms
        self._calibration_digest = calibration.digest if calibration is not None else b""
        self._new_namespace = new_namespace
        self._namespace: Namespace | None = self._coded_namespace()
        self._weights_changed = False
        profile = transforms.profile(self._calibration_digest)
        # Nothing but the transforms restores calibrated pages yet; they do so on the pool's device.
        kernel = restore_kernel(pool, profile.name) if calibration is None else None
        if profile.has_pictures:
            # Refuses here, at start, rather than on a thread later.
            open_decoder().close()
            open_encoder().close()
        self.progress = threading.Event()
        self.cache = BitstreamCache(config.host_cache_bytes)
        self._peer = GrpcPeer(config.remote, config.timeouts)
        self._monitor = PeerMonitor(self._peer, config.timeouts.retry_s)
        stored = StoredPages()
        self.fetcher = Fetcher(
            self._peer, self._monitor, self.cache, stored, transforms, config, on_done=self.progress.set
        )

        def new_decoder() -> GroupDecoder:
            return GroupDecoder(transforms, open_decoder() if profile.has_pictures else None)

        def new_encoder(namespace_digest: bytes) -> PageEncoder:
            is_calibrated = bool(self._calibration_digest)
            encoder = open_encoder(uniform_blocks=is_calibrated) if profile.has_pictures else None
            return PageEncoder(namespace_digest, transforms, encoder, self._calibration_digest)

        self.restorer = Restorer(pool, new_decoder, config.decode_threads, kernel, transforms.uncalibrated.name)
        self.publisher = Publisher(self._peer, self._monitor, stored, pool, new_encoder, config)
        logger.info(
            "kvcodec: %s, profile %s (%s), %d layers x %d heads x %d, namespace %s",
            config.remote,
            profile.name,
            profile.promise,
            pool.spec.layers,
            pool.spec.kv_heads,
            pool.spec.head_dim,
            self._namespace.digest.hex()[:16] if self._namespace else "none",
        )

    def _coded_namespace(self) -> Namespace:
        """The namespace of what is published now."""
        profile = self._transforms.profile(self._calibration_digest)
        return dataclasses.replace(
            self._new_namespace(),
            profile=profile.name,
            stages=profile.stages,
            calibration_digest=self._calibration_digest.hex(),
        )

    def namespace_digest(self) -> bytes | None:
        """The namespace of pages computed now; None while pages of old weights may be around."""
        if self._weights_changed:
            return None
        if self._namespace is None:
            self._namespace = self._coded_namespace()
            logger.info("kvcodec: new weights, namespace %s", self._namespace.digest.hex()[:16])
        return self._namespace.digest

    def weights_changing(self) -> None:
        """New weights come in: no page is fetched or published until the tree has been flushed."""
        self._weights_changed = True

    def flushed(self) -> None:
        """The tree is empty: what comes now is of the weights that are loaded now."""
        if self._weights_changed:
            # Computed at the next use: at this moment the weights may be offloaded.
            self._namespace = None
            self._weights_changed = False
            self.cache.clear()

    def close(self) -> None:
        """Ends all threads and the connection."""
        self._monitor.close()
        self._peer.close()
        self.fetcher.close()
        self.publisher.close()
        self.restorer.close()
