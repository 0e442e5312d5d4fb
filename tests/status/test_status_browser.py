"""The status page in a real browser: it lives, asks nobody else for anything, and runs nothing that it is told."""

import asyncio
import contextlib
import hashlib
import urllib.parse

import pytest
from browser_kit import browser_tab
from cli.peer_kit import HASHES, NAMESPACE, PAGES, PATIENT, fetch_all
from cli.pki_kit import DAY, Authority
from report_kit import facts_of, page_of

from sglang_kvcodec import peer_metrics
from sglang_kvcodec.config import Access
from sglang_kvcodec.errors import PeerRejectedError
from sglang_kvcodec.rpc.admission import Admission
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.rpc.tokens import TokenEntry, append_entry
from sglang_kvcodec.status import StatusListener, StatusReport, StatusSite
from sglang_kvcodec.testing.peer import PeerProcess
from sglang_kvcodec.testing.processes import free_port

HOSTILE = """</script><img src=x onerror="owned=1"><b>bold</b>'\u202e${1}&lt;"""
HIGHEST_POINT = """
Math.min(...[...document.querySelectorAll("#chart polyline.%s")].flatMap((line) => [...line.points].map((p) => p.y)))
"""
BASELINE = "Math.max(...[...document.querySelectorAll('#chart line.grid')].map((line) => line.y1.baseVal.value))"


def in_browser(tmp_path, scenario):
    """Runs ``scenario(tab)``; afterwards the page must have asked its own server alone, and have had no complaint."""

    async def run():
        async with browser_tab(tmp_path) as tab:
            await scenario(tab)
            assert tab.complaints == []
            asked = [urllib.parse.urlsplit(url) for url in tab.requests]
            assert len({(parts.hostname, parts.port) for parts in asked if parts.scheme != "data"}) == 1

    asyncio.run(run())


def test_it_follows_what_the_peer_does_without_being_loaded_again(tmp_path):
    arguments = ["--status-page", f"127.0.0.1:{free_port()}"]
    with (
        PeerProcess(f"lmdb:{tmp_path}/store", arguments=arguments) as process,
        contextlib.closing(GrpcPeer(process.remote, PATIENT, max_message_bytes=1)) as client,
    ):

        async def scenario(tab):
            await tab.open(page_of(process))
            await tab.wait_for_text("#state", "ready")
            assert await tab.evaluate("document.title") == f"kvcodec peer {process.address}"
            assert await tab.text("#objects") == "0"
            assert await tab.text("#hits") == "\u2013"
            assert await tab.text("#clients") == "Nobody has called yet."
            assert await tab.text("#errors") == "None."
            await tab.evaluate("still_here = true")

            await asyncio.to_thread(client.put, NAMESPACE, PAGES)
            await asyncio.to_thread(client.lookup, NAMESPACE, [*HASHES, bytes(32)])
            assert await asyncio.to_thread(fetch_all, client) == [data for _, data in PAGES]
            with pytest.raises(PeerRejectedError):
                await asyncio.to_thread(client.lookup, bytes(31), HASHES)

            await tab.wait_for("document.querySelector('#objects').innerText === '4'")
            assert await tab.text("#stored") == "1.2 MB"
            assert "of 1.1 GB" in await tab.text("#capacity")
            await tab.wait_for_text("#hits", "80.0 %")
            await tab.wait_for_text("#fetch-hits", "100.0 %, 100.0 %")
            await tab.wait_for_text("#moved", "sent 1.2 MB, received 1.2 MB")
            await tab.wait_for_text("#errors", "INVALID_ARGUMENT")
            for name in ("sent", "received"):
                # Drawn above the axis.
                await tab.wait_for(f"{HIGHEST_POINT % name} < {BASELINE} - 10")
            cells = await tab.evaluate(
                "[...document.querySelectorAll('#prefixes tbody tr')].map((r) => [...r.cells].map((c) => c.innerText))"
            )
            assert [row[:4] for row in cells] == [
                [f"{HASHES[3].hex()[:12]}…", f"{NAMESPACE.hex()[:12]}…", "4", "1 \u00d7"]
            ]
            assert "ipv4:127.0.0.1" in await tab.text("#clients tbody tr")
            assert await tab.evaluate("still_here")
            assert tab.requests.count(page_of(process)) == 1
            assert tab.complaints == []

            # It says so when the peer is gone, and goes on by itself when it is back.
            process.kill()
            await tab.wait_for_text("#lost", "does not answer")
            assert await tab.text("#state") == "no answer"
            assert await tab.text("#objects") == "4"
            process.restart()
            await tab.wait_for_text("#state", "ready")
            assert await tab.evaluate("document.querySelector('#lost').hidden && still_here")
            # Of the time without a peer.
            assert all("net::ERR_" in complaint for complaint in tab.complaints)
            tab.complaints.clear()

        in_browser(tmp_path, scenario)


@pytest.fixture
def hostile_page():
    facts = facts_of(address=HOSTILE, store=HOSTILE)
    with facts.clients.call(HOSTILE):
        pass
    facts.prefixes.note(b"\xff" * 64, 3)
    peer_metrics.STORE_DAMAGED.labels(HOSTILE).inc()
    report = StatusReport(facts)
    with contextlib.closing(
        StatusListener("127.0.0.1:0", StatusSite(report.to_dict, Admission(None), "127.0.0.1"), report)
    ) as listener:
        yield listener.url
    peer_metrics.STORE_DAMAGED.remove(HOSTILE)


def test_what_comes_from_outside_is_text(tmp_path, hostile_page):
    async def scenario(tab):
        await tab.open(hostile_page)
        await tab.wait_for("document.querySelector('#updated').innerText !== '\u2013'")
        assert await tab.evaluate("document.title") == f"kvcodec peer {HOSTILE}"
        for place in ("#address", "#clients tbody td", "#errors tbody td"):
            shown = await tab.evaluate(f"[...document.querySelectorAll({place!r})].map((each) => each.textContent)")
            assert HOSTILE in shown
        assert (await tab.evaluate("document.querySelector('#about').textContent")).startswith(HOSTILE)
        assert await tab.evaluate("document.querySelectorAll('img, main td b, header b').length") == 0
        assert await tab.evaluate("typeof owned") == "undefined"

    in_browser(tmp_path, scenario)


def test_a_script_that_gets_into_the_page_nevertheless_does_not_run(tmp_path, hostile_page):
    """The policy alone: what the page never does is done by hand."""

    async def scenario(tab):
        await tab.open(hostile_page)
        await tab.wait_for_text("#clients", "bold")
        await tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"owned=1\">')")
        await tab.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'owned=1'}))")
        assert await tab.evaluate("fetch('http://127.0.0.1:9/').then(() => 'asked', () => 'refused')") == "refused"
        assert await tab.evaluate("typeof owned") == "undefined"
        assert tab.complaints
        assert all("Content Security Policy" in complaint for complaint in tab.complaints)
        tab.complaints.clear()

    in_browser(tmp_path, scenario)


def test_an_operator_gives_a_token_as_password_and_sees_when_the_certificate_expires(tmp_path):
    authority = Authority(tmp_path)
    certificate, key = authority.issue("peer", ends=10 * DAY)
    tokens = tmp_path / "tokens.toml"
    append_entry(tokens, TokenEntry("operator", hashlib.sha256(b"secret").digest(), frozenset(["admin"])))
    append_entry(tokens, TokenEntry("server", hashlib.sha256(b"server's").digest(), frozenset(["read", "write"])))
    (tmp_path / "server.token").write_text("server's")
    access = Access(tls_ca=str(authority.file), token_file=str(tmp_path / "server.token"))
    arguments = ["--tokens", str(tokens), "--tls-cert", str(certificate), "--tls-key", str(key)]
    with (
        PeerProcess(arguments=["--status-page", "127.0.0.1:0", *arguments]) as process,
        contextlib.closing(GrpcPeer(process.remote, PATIENT, access=access)) as client,
    ):

        async def scenario(tab):
            # The browser knows no authority of ours; others check that the certificate is the right one.
            await tab.call("Security.setIgnoreCertificateErrors", ignore=True)
            await tab.open(page_of(process).replace("//", "//operator:secret@"))
            await tab.wait_for_text("#state", "ready")
            await asyncio.to_thread(client.put, NAMESPACE, PAGES)
            await tab.wait_for_text("#clients", "server")
            assert await tab.text("#certificate.warn") == " · certificate expires in 9 days"
            # Once it is withdrawn the page shows no more.
            tokens.write_text(tokens.read_text().replace("operator", "somebody-else").replace("admin", "read"))
            await tab.wait_for_text("#lost", "asks for a token")
            assert all("401" in complaint for complaint in tab.complaints)
            tab.complaints.clear()

        in_browser(tmp_path, scenario)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_can_be_read(tmp_path, hostile_page, scheme, width):
    """Every text stands out from its ground (WCAG's 4.5), and nothing is wider than the window."""
    contrast = """
    (() => {
      const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
      const luminance = (colour) => channels(colour).slice(0, 3)
        .map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, index) => sum + c * [0.2126, 0.7152, 0.0722][index], 0);
      const ground = (element) => {
        const own = getComputedStyle(element).backgroundColor;
        return channels(own)[3] === 0 ? ground(element.parentElement) : own;
      };
      const texts = [...document.querySelectorAll("body :not(script)")].filter((element) =>
        [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) && element.checkVisibility());
      return texts.map((element) => {
        const style = getComputedStyle(element);
        const pair = [luminance(element.closest("svg") ? style.fill : style.color), luminance(ground(element))];
        return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), element.outerHTML.slice(0, 80)];
      });
    })()
    """

    async def scenario(tab):
        await tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        await tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        await tab.open(hostile_page)
        await tab.wait_for_text("#clients", "bold")
        ratios = await tab.evaluate(contrast)
        assert len(ratios) > 30
        assert [text for ratio, text in ratios if ratio < 4.5] == []
        assert await tab.evaluate("document.documentElement.scrollWidth <= innerWidth")

    in_browser(tmp_path, scenario)
