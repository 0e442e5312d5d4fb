"""A real browser without a window, driven by Chromium's DevTools protocol."""

import asyncio
import base64
import contextlib
import itertools
import shutil
import subprocess

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--remote-debugging-port=0", "--window-size=1280,1000"),
)
PATIENCE_S = 120


def find_browser():
    """The program. A test without one fails: it never passes by being skipped."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    assert found, "no Chromium to test the status page in; on Debian: apt-get install chromium"
    return found


class Tab:
    """One page of a browser: what it says to be looked at, and what it asks for."""

    def __init__(self, socket):
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers = {}
        self._loaded = asyncio.Event()
        self.requests = []
        """The URL of every request."""
        self.complaints = []
        """What the console says of errors and warnings, and every exception, as text."""
        self._listening = asyncio.create_task(self._listen())

    async def call(self, method, **parameters):
        """Sends a command of the protocol; its result."""
        number = next(self._numbers)
        answered = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        answer = await asyncio.wait_for(answered, PATIENCE_S)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    async def open(self, url):
        for domain in ("Page", "Network", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        result = await self.call("Page.navigate", url=url)
        assert "errorText" not in result, result
        # Before that, an expression may meet the page of before, or go down with it.
        await asyncio.wait_for(self._loaded.wait(), PATIENCE_S)

    async def evaluate(self, expression):
        """The value of a JavaScript expression."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def text(self, selector):
        """What a reader sees of the first element that matches; None where there is none."""
        return await self.evaluate(f"document.querySelector({selector!r})?.innerText ?? null")

    async def wait_for(self, expression):
        """Waits until an expression is true."""
        async with asyncio.timeout(PATIENCE_S):
            while not await self.evaluate(expression):
                await asyncio.sleep(0.05)

    async def wait_for_text(self, selector, words):
        await self.wait_for(f"(document.querySelector({selector!r})?.innerText ?? '').includes({words!r})")

    async def screenshot(self):
        result = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(result["data"])

    async def close(self):
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)

    async def _listen(self):
        async for message in self._socket:
            event = message.json()
            if "id" in event:
                self._answers.pop(event["id"]).set_result(event)
                continue
            told = event["params"]
            if event["method"] == "Page.loadEventFired":
                self._loaded.set()
            elif event["method"] == "Network.requestWillBeSent":
                self.requests.append(told["request"]["url"])
            elif event["method"] == "Runtime.exceptionThrown":
                self.complaints.append(str(told["exceptionDetails"]))
            elif event["method"] == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(told["args"]))
            elif event["method"] == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                self.complaints.append(str(told["entry"]))


@contextlib.asynccontextmanager
async def browser_tab(directory):
    """A tab of a new browser, whose profile is in an empty ``directory``."""
    log = (directory / "browser.log").open("wb")
    profile = directory / "profile"
    profile.mkdir()
    command = [find_browser(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        port_file = profile / "DevToolsActivePort"
        async with asyncio.timeout(PATIENCE_S):
            while not (port_file.exists() and port_file.read_text().count("\n")):
                assert process.poll() is None, (directory / "browser.log").read_text()
                await asyncio.sleep(0.05)
        port = port_file.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                (address,) = (each["webSocketDebuggerUrl"] for each in await response.json() if each["type"] == "page")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                tab = Tab(socket)
                try:
                    yield tab
                finally:
                    await tab.close()
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()
