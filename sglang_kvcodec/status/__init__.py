"""The status page of a storage peer: what it shows, and who gets to see it. No torch."""

from sglang_kvcodec.status.listener import StatusListener
from sglang_kvcodec.status.report import PeerFacts, StatusReport
from sglang_kvcodec.status.site import StatusSite

__all__ = ["PeerFacts", "StatusListener", "StatusReport", "StatusSite"]
