"""A peer's facts without a peer, and answers of a status page."""

import base64
import http.client
import json
import ssl
import urllib.parse

from sglang_kvcodec.rpc.client_tallies import ClientTallies
from sglang_kvcodec.rpc.hot_prefixes import HotPrefixes
from sglang_kvcodec.status import PeerFacts


def facts_of(address="127.0.0.1:7440", store="memory:", is_draining=lambda: False):
    return PeerFacts(lambda: address, store, is_draining, ClientTallies(), HotPrefixes())


class Answer:
    """Of one request."""

    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def told(self):
        return json.loads(self.body)


def ask(url, path="/", method="GET", ca=None, certificate=None, **headers):
    """Asks a page that is served at ``url``; names of headers with underscores."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=ca)
        if certificate:
            context.load_cert_chain(*certificate)
        connection = http.client.HTTPSConnection(parts.netloc, timeout=60, context=context)
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): text for name, text in headers.items()})
        return Answer(connection.getresponse())
    finally:
        connection.close()


def as_password(token):
    """What a browser sends for a password."""
    return f"Basic {base64.b64encode(f'anybody:{token}'.encode()).decode()}"


def page_of(process):
    """The address of the page of a peer that was started with one."""
    return process.ready_line.rpartition("status=")[2].split()[0]
