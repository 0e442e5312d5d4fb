"""Everything one rank runs for kvcodec, built once and closed together."""

from __future__ import annotations

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
from sglang_kvcodec.format.namespace import Namespace
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.transform import PageTransforms
from sglang_kvcodec.video import open_decoder, open_encoder

logger = logging.getLogger(__name__)


class Runtime:
    """The flow of one rank, and the namespace its pages are in."""

    def __init__(self, config: ServerConfig, pool: PagedKVPool, new_namespace: Callable[[], Namespace]) -> None:
        """Connects and starts the threads; does not wait for the peer.

        Args:
            config: the operator's settings.
            pool: this rank's pool.
            new_namespace: computes the namespace from the weights that are loaded now.

        Raises:
            ConfigurationError: the profile can't code the pool, or a codec or its device's kernel is missing.
        """
        transforms = PageTransforms(pool.spec, config.profile, device=pool.device)
        profile = transforms.uncalibrated
        self.config = config
        self.pool = pool
        self._new_namespace = new_namespace
        self._namespace: Namespace | None = new_namespace()
        self._weights_changed = False
        kernel = restore_kernel(pool, profile.name)
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
            encoder = open_encoder() if profile.has_pictures else None
            return PageEncoder(namespace_digest, transforms, encoder)

        self.restorer = Restorer(pool, new_decoder, config.decode_threads, kernel)
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

    def namespace_digest(self) -> bytes | None:
        """The namespace of pages computed now; None while pages of old weights may be around."""
        if self._weights_changed:
            return None
        if self._namespace is None:
            self._namespace = self._new_namespace()
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
