"""What the planner knows of this server and its peer.

Nothing here sends anything or waits. Measuring is done by those who work: the fetcher tells what arrives, the restorer
what a part took, the scheduler what a forward pass took.
"""

from __future__ import annotations

from sglang_kvcodec.flow.link_meter import LinkMeter
from sglang_kvcodec.flow.prefill_meter import PrefillMeter
from sglang_kvcodec.flow.restore_meter import RestoreMeter


class Rates:
    """All that is measured, for one server process and one peer."""

    def __init__(self, link: LinkMeter, restore: RestoreMeter, prefill: PrefillMeter) -> None:
        """Puts them together, and has both fits renewed after each restore: not only fetches ask for them."""
        self.link = link
        self.restore = restore
        self.prefill = prefill
        restore.on_idle = self._refit

    def _refit(self) -> None:
        self.restore.renew()
        self.prefill.model()
