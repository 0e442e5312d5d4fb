"""What is answered to an HTTP request: the page, what it is fed with, or why not. Reads nothing of a request's body."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from aiohttp import web

from sglang_kvcodec.config import is_loopback
from sglang_kvcodec.errors import AccessError
from sglang_kvcodec.rpc.admission import Admission

PAGE_PATH, REPORT_PATH = "/", "/status.json"
_METHODS = ("GET", "HEAD")
_BASIC = "basic "
_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


class StatusSite:
    """Answers requests for one peer's page."""

    def __init__(self, report: Callable[[], Mapping[str, Any]], admission: Admission, host: str) -> None:
        """Prepares the page.

        Args:
            report: what the page is told, anew for each request.
            admission: who may see it.
            host: where it is served.
        """
        self._report = report
        self._admission = admission
        self._is_local = is_loopback(host)
        self._page = pathlib.Path(__file__).with_name("page.html").read_bytes()
        self._headers = {
            "Content-Security-Policy": _policy(self._page),
            "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "Server": "kvcodec",
            "X-Content-Type-Options": "nosniff",
        }

    def answer(self, request: web.BaseRequest) -> web.Response:
        """The response to a request."""
        response = self._refusal(request) or self._content(request.path)
        response.headers.update(self._headers)
        # One request for each connection, so that one bound on its time is a bound on everything.
        response.force_close()
        return response

    def _refusal(self, request: web.BaseRequest) -> web.Response | None:
        if self._is_local and not is_loopback(_host(request)):
            # Else a page from elsewhere, whose name was made to point here, could read it in an operator's browser.
            return _words(403, "this page is served at the address of this machine only, as localhost\n")
        try:
            self._admission.require_operator(list(_metadata(request)), "this page")
        except AccessError as error:
            refusal = _words(401, f"{error}\n")
            if request.path != REPORT_PATH:
                # Has a browser ask for it. Not again and again, for what an open page is fed with.
                refusal.headers["WWW-Authenticate"] = (
                    'Basic realm="kvcodec peer: the password is a token", charset="UTF-8"'
                )
            return refusal
        if request.method not in _METHODS:
            refusal = _words(405, "this page is for reading\n")
            refusal.headers["Allow"] = ", ".join(_METHODS)
            return refusal
        return None

    def _content(self, path: str) -> web.Response:
        if path == PAGE_PATH:
            return web.Response(body=self._page, content_type="text/html", charset="utf-8")
        if path == REPORT_PATH:
            return web.Response(body=json.dumps(self._report()).encode(), content_type="application/json")
        return _words(404, "there is nothing here; the page is /\n")


def _words(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text, content_type="text/plain")


def _host(request: web.BaseRequest) -> str:
    """The host that the request names, without its port; empty where it names none."""
    return re.sub(r":\d*$", "", request.headers.get("Host", ""))


def _metadata(request: web.BaseRequest) -> Iterator[tuple[str, str | bytes]]:
    """The token of a request as gRPC has it; a browser sends it as the password of any user."""
    for header in request.headers.getall("Authorization", ()):
        if header.lower().startswith(_BASIC):
            try:
                words = base64.b64decode(header[len(_BASIC) :], validate=True).decode()
            except (binascii.Error, UnicodeDecodeError):
                continue
            header = f"Bearer {words.partition(':')[2]}"
        yield "authorization", header


def _policy(page: bytes) -> str:
    """Lets the page run what is in it and ask the peer; nothing else, and nowhere else."""
    hashes = {"script": "", "style": ""}
    for kind, text in _INLINE.findall(page):
        hashes[kind.decode()] += f" 'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
    return (
        f"default-src 'none'; script-src{hashes['script']}; style-src{hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
