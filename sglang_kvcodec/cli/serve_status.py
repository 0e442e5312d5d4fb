"""The flag of ``kvcodec serve`` for a status page, and the page itself while the peer runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sglang_kvcodec.cli.serve_security import check_listen
from sglang_kvcodec.cli.settings import Settings
from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.rpc.server import PeerSecurity, PeerServer


def add_status_argument(parser: Settings) -> None:
    """Adds the flag."""
    parser.add_argument(
        "--status-page",
        metavar="HOST:PORT",
        help="serve a page for browsers there; with --tokens for scope admin alone",
    )


def check_status_page(listen: str | None, insecure: bool, security: PeerSecurity) -> None:
    """Refuses an address that ``kvcodec serve`` would not listen on either.

    Raises:
        ConfigurationError: not an address, or one beyond this machine that is not secured, without ``insecure``.
    """
    if listen is not None:
        check_listen(listen, insecure, security)


@contextlib.contextmanager
def status_page(listen: str | None, server: PeerServer, security: PeerSecurity, store: str) -> Iterator[str]:
    """Serves the page of ``server`` inside the block; gives words for the line that says ready.

    Raises:
        ConfigurationError: it can't listen there.
    """
    if listen is None:
        yield ""
        return
    try:
        # Not before it is asked for: other peers need no HTTP server.
        from sglang_kvcodec.status import PeerFacts, StatusListener, StatusReport, StatusSite
    except ImportError as error:
        raise ConfigurationError(f"--status-page needs the extra [server]: {error}") from error
    facts = PeerFacts(
        lambda: server.address, store, lambda: server.is_draining, clients=server.clients, prefixes=server.prefixes
    )
    report = StatusReport(facts)
    site = StatusSite(report.to_dict, server.admission, listen.rpartition(":")[0])
    context = security.certificates.context if security.certificates is not None else None
    with contextlib.closing(StatusListener(listen, site, report, context)) as listener:
        yield f" status={listener.url}"
