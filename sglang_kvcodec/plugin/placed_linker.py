"""Tells the linker what comes in its prompt before a node that is offered for publishing."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinkerWrapper


class PlacedLinkerWrapper(UnifiedCacheLinkerWrapper):
    """SGLang's own, which hands a node's pages over without saying which there are before them.

    A page's position is a function of its hash, which is chained: whatever splits and merges nodes, a page comes with
    the same position each time. It is a token's index in the prompt. Where a model's positions are something else
    (M-RoPE of images and video), its rotation is not understood, its K is coded as it is, and the position only picks
    the gain of a page.
    """

    def hit_pages(self, rid: str) -> int:
        """How many pages the last look-up of a request has found that are not on the device; the same on all ranks."""
        hit = self.hit_markers.get(rid)
        return 0 if hit is None else len(hit.tail_hashes)

    def _offload_node(self, node_id: Any, transfers: Any) -> None:
        before = self.cache.tree_core.get_prefix_hash_values(node_id)
        with self.cache_linker.offload_after(before):
            super()._offload_node(node_id, transfers)
