"""A headless Chromium driven over its DevTools pipe, with nothing but the standard library."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    # whatever a page asks of a network fails
    *("--proxy-server=127.0.0.1:9", "--proxy-bypass-list=<-loopback>", "--remote-debugging-pipe"),
]
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Enter": 13}


class Browser:
    """One page. `profile` is an empty folder of its own.

    Attributes:
        requested: URLs that the page has asked for since it was opened.
        failures: errors that its scripts did not catch.
    """

    def __init__(self, profile: Path) -> None:
        chromium = shutil.which("chromium")
        assert chromium, "the report is tested in Debian's chromium: apt-get update && apt-get install -y chromium"
        commands, self._commands = os.pipe()
        self._events, events = os.pipe()
        # Chromium reads descriptor 3 and writes 4
        redirected = ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{events}', "bash", chromium]
        self._process = subprocess.Popen(
            [*redirected, *FLAGS, f"--user-data-dir={profile}"], pass_fds=(commands, events), stderr=subprocess.DEVNULL
        )
        os.close(commands)
        os.close(events)
        self._reader = os.fdopen(self._events, "rb")
        self._last, self._session, self._phone = 0, None, False
        self.requested: list[str] = []
        self.failures: list[str] = []
        self._happened: set[str | None] = set()
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self._call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait()
        self._reader.close()
        os.close(self._commands)

    def open(self, path: Path, width: int, height: int) -> None:
        """Load a file in a window of that many pixels; a narrow one is a phone's."""
        self._phone = width < 600
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": self._phone}
        self._call("Emulation.setDeviceMetricsOverride", **screen)
        self._call("Emulation.setTouchEmulationEnabled", enabled=self._phone)
        self.requested.clear()
        self.failures.clear()
        self._happened.clear()
        self._call("Page.navigate", url=path.as_uri())
        while "Page.loadEventFired" not in self._happened:
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, x: float, y: float) -> None:
        """At a point of the window; on a phone with a finger. Returns once the page has had it."""
        self.evaluate('clicked = new Promise((had) => addEventListener("click", had, { once: true })); null')
        if self._phone:
            self._call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
            self._call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            for kind in ("mousePressed", "mouseReleased"):
                self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
        self.evaluate("clicked.then(() => null)")

    def press(self, key: str) -> None:
        code: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        if key == "Enter":
            code["text"] = "\r"
        self._call("Input.dispatchKeyEvent", type="keyDown", **code)
        self._call("Input.dispatchKeyEvent", type="keyUp", **code)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Write a PNG of the page, or of what the window shows."""
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=whole, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._last:
            pass
        assert "error" not in answer, answer["error"]
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._reader.read(1)) != b"\0":
            assert byte, "chromium has ended"
            text += byte
        message: dict[str, Any] = json.loads(text)
        self._happened.add(message.get("method"))
        if message.get("method") == "Network.requestWillBeSent":
            self.requested.append(message["params"]["request"]["url"])
        if message.get("method") == "Runtime.exceptionThrown":
            self.failures.append(message["params"]["exceptionDetails"]["text"])
        return message
