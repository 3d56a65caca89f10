"""A headless Chromium for tests, spoken to in its DevTools protocol through a pipe: no driver, no port, no package.

The protocol: https://chromedevtools.github.io/devtools-protocol. Messages are JSON, each ended by a zero byte; Chromium
reads them from file descriptor 3 and writes to 4.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Puts the two ends of the pipes where Chromium looks for them, and becomes Chromium.
EXEC = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"


def find() -> str | None:
    """Where a Chromium is."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page in a browser of its own. What the page logs, throws or asks the network for is kept in `complaints`."""

    def __init__(self, executable: str, profile: Path, *, width: int = 1200, height: int = 900):
        theirs, to = os.pipe()
        back, their_answers = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (theirs, their_answers)]  # out of the way of 3 and 4
        flags = [
            "--headless",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "--no-first-run",
            "--disable-gpu",
        ]
        flags += ["--no-sandbox"] if os.getuid() == 0 else []  # as root it refuses to run with one
        command = [sys.executable, "-c", EXEC, *map(str, high), executable, *flags, "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=high, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for fd in (theirs, their_answers, *high):
            os.close(fd)
        self._to, self._back, self._buffer, self._sent = to, back, b"", 0
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": height}
        self.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._to)
        os.close(self._back)

    def call(self, method: str, **params: Any) -> Any:
        """Sends a command and returns its result; raises RuntimeError with the browser's words if it failed."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        data = memoryview(json.dumps(message).encode() + b"\0")
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._sent:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _receive(self, timeout: float = 60) -> dict[str, Any]:
        end = time.monotonic() + timeout
        while b"\0" not in self._buffer:
            if not select.select([self._back], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(f"nothing from the browser in {timeout} s")
            chunk = os.read(self._back, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser has gone")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        self._notice(message.get("method"), message.get("params", {}))
        return message

    def _notice(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "data:", "about:")):
                self.complaints.append(f"asked for {url}")
        if method:
            self._events.append({"method": method})

    def open(self, path: Path) -> None:
        """Opens a file and waits until it is loaded."""
        self._events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while {"method": "Page.loadEventFired"} not in self._events:
            self._receive()

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def media(self, *, scheme: str = "light", print: bool = False) -> None:
        """Light or dark, screen or print."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media="print" if print else "screen", features=features)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element, which is scrolled to."""
        self.ask(
            f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center', behavior: 'instant'}})"
        )
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()"
        rect = self.ask(box)
        return rect["left"], rect["top"], rect["width"], rect["height"]

    def mouse(self, kind: str, x: float, y: float, *, buttons: int = 0) -> None:
        """`kind` is mouseMoved, mousePressed or mouseReleased."""
        button = "left" if buttons or kind != "mouseMoved" else "none"
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=buttons, clickCount=1)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Presses at one place, moves to another and lets go, as a hand does."""
        self.mouse("mouseMoved", *start)
        self.mouse("mousePressed", *start, buttons=1)
        for part in (0.3, 0.7, 1.0):
            self.mouse("mouseMoved", *(a + part * (b - a) for a, b in zip(start, end)), buttons=1)
        self.mouse("mouseReleased", *end)

    def click(self, selector: str) -> None:
        """A click into the middle of an element."""
        left, top, width, height = self.box(selector)
        place = (left + width / 2, top + height / 2)
        self.mouse("mouseMoved", *place)
        self.mouse("mousePressed", *place, buttons=1)
        self.mouse("mouseReleased", *place)

    def key(self, name: str) -> None:
        """A key by its name, as ArrowLeft."""
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=codes[name])

    def screenshot(self, *, whole: bool = False) -> bytes:
        """What is seen, or the whole page, as PNG."""
        options: dict[str, Any] = {"format": "png"}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            options |= {"captureBeyondViewport": True, "clip": size | {"scale": 1}}
        return base64.b64decode(self.call("Page.captureScreenshot", **options)["data"])

    def pdf(self) -> bytes:
        """The page in print."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])
