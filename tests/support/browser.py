"""A headless Chromium, told what to do by the DevTools protocol over two pipes (--remote-debugging-pipe)."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60
FLAGS = (
    "--headless=new",
    "--hide-scrollbars",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-dev-shm-usage",
)
TELLING = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")


def find_browser() -> str | None:
    """Where it is."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser that has just been started.

    Attributes:
        requests: addresses that the page has asked for.
        complaints: what it has logged, or thrown.
    """

    def __init__(self, home: Path) -> None:
        program = find_browser()
        assert program, f"no browser: none of {', '.join(NAMES)}; on Debian: apt-get install chromium"
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        # The browser reads from descriptor 3 and writes to 4.
        line = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        told = [program, *FLAGS, f"--user-data-dir={home}", "--remote-debugging-pipe", "about:blank"]
        self._log = (home.parent / f"{home.name}.log").open("w")
        self._process = subprocess.Popen(
            ["bash", "-c", line, "bash", *told], pass_fds=(to_browser, from_browser), stdout=self._log, stderr=self._log
        )
        os.close(to_browser)
        os.close(from_browser)
        self._numbers, self._rest, self._session = itertools.count(1), b"", ""
        self.requests: list[str] = []
        self.complaints: list[Any] = []
        self._loaded = False
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.do(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        os.close(self._out)
        os.close(self._in)
        self._log.close()

    def do(self, method: str, **parameters: Any) -> Any:
        """Carry out a command of the protocol; its result."""
        number = next(self._numbers)
        told = {"id": number, "method": method, "params": parameters}
        told |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(told).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, *, width: int = 1280, dark: bool = False) -> None:
        """Load a file as somebody would see it, and forget what came before."""
        self.requests.clear()
        self.complaints.clear()
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.do("Page.navigate", url=page.resolve().as_uri())
        while not self._loaded:
            self._next()
        self.ask("document.fonts.ready.then(() => new Promise(done => setTimeout(done, 100)))")  # late requests

    def ask(self, script: str) -> Any:
        """The JSON value of an expression in the page."""
        found = self.do("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self) -> str:
        """What is seen of the page as PNG, in base 64."""
        return str(self.do("Page.captureScreenshot")["data"])

    def _next(self) -> dict[str, Any]:
        limit = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, limit - time.monotonic()))
            part = os.read(self._in, 1 << 20) if ready else b""
            assert part, f"the browser is silent; {Path(self._log.name).read_text()[-2000:]}"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._take(message.get("method"), message.get("params", {}))
        return message

    def _take(self, method: str | None, told: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method in TELLING:
            self.complaints.append(told)
        elif method == "Page.loadEventFired":
            self._loaded = True


if __name__ == "__main__":  # PAGE PICTURE WIDTH HEIGHT light|dark; height 0 is all of it
    import base64
    import tempfile

    page, target, width, height, scheme = sys.argv[1:]
    with tempfile.TemporaryDirectory() as home, Browser(Path(home) / "home") as browser:
        browser.open(Path(page), width=int(width), dark=scheme == "dark")
        whole = int(height) or browser.ask("document.documentElement.scrollHeight")
        size = {"width": int(width), "height": whole, "deviceScaleFactor": 1, "mobile": False}
        browser.do("Emulation.setDeviceMetricsOverride", **size)
        Path(target).write_bytes(base64.b64decode(browser.picture()))
