"""A headless Chromium, driven through its DevTools protocol over a pipe."""

import base64
import json
import select
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from viommu.lab.assets import cache_directory
from viommu.lab.provision.cache import Cache
from viommu.lab.provision.chromium import provide

_LIMIT = 60.0  # seconds for an answer
# The browser reads commands from descriptor 3 and answers on 4.
_STARTER = 'exec "$@" 3<&0 4>&1 </dev/null >&2'


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


class Chromium:
    """One tab. `errors` are what scripts threw and complained of, `requests` the addresses that were asked for."""

    def __init__(self, *, width: int = 1440, height: int = 1100, dark: bool = False) -> None:
        program = provide(Cache(cache_directory()), _say)
        self._home = TemporaryDirectory(prefix="viommu-chromium-")
        # It runs as root in containers, where its own sandbox cannot be made.
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={self._home.name}", "--headless"]
        command = [
            "sh",
            "-c",
            _STARTER,
            "sh",
            str(program),
            *options,
            f"--window-size={width},{height}",
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._buffer, self._count = b"", 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank", width=width, height=height)
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.scheme(dark=dark)

    def scheme(self, *, dark: bool) -> None:
        """Prefer light or dark."""
        value = "dark" if dark else "light"
        features = [{"name": "prefers-color-scheme", "value": value}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def call(self, method: str, /, **parameters: Any) -> dict[str, Any]:
        """One call of the protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        deadline = time.monotonic() + _LIMIT
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self, deadline: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        while b"\0" not in self._buffer:
            left = max(deadline - time.monotonic(), 0)
            ready, _, _ = select.select([self._process.stdout], [], [], left)
            chunk = self._process.stdout.read1(1 << 20) if ready else b""  # type: ignore[attr-defined]
            assert chunk, "the browser does not answer"
            self._buffer += chunk
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, parameters: dict[str, Any]) -> None:
        match method:
            case "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                self.errors.append(
                    details.get("exception", details).get("description", str(details))
                )
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.errors.append(parameters["entry"]["text"])
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "assert"):
                self.errors.append(str(parameters["args"]))
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Page.loadEventFired":
                self._loaded = True

    def open(self, page: Path) -> None:
        """Load a file, and wait until the time line has been drawn."""
        self._loaded = False
        answer = self.call("Page.navigate", url=page.as_uri())
        assert "errorText" not in answer, answer
        deadline = time.monotonic() + _LIMIT
        while not self._loaded:
            self._receive(deadline)
        self.settle()

    def settle(self) -> None:
        """Wait until what is to be drawn has been drawn."""
        for _ in range(3):
            frame = "new Promise(done => requestAnimationFrame(done))"
            self.call("Runtime.evaluate", expression=frame, awaitPromise=True)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, x: float, y: float) -> None:
        """A click of the mouse, in pixels of the window."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def key(self, key: str) -> None:
        """A key, pressed and released."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)
        self.settle()

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """The window, or the whole page, as a PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End the browser."""
        self._process.kill()
        self._process.communicate()
        self._home.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
