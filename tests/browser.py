"""Headless Chromium, driven through its DevTools protocol by the standard library alone."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --remote-debugging-port=0"
)
_PATIENCE = 60.0


def chromium() -> str:
    """Return the browser's program; skip the test where there is none."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium on this machine")
    return found


class Browser:
    """One tab. `events` are the protocol's messages that no call has asked for."""

    def __init__(self, profile: Path) -> None:
        program = chromium()
        self.events: list[dict[str, Any]] = []
        self._number = 0
        self._process = subprocess.Popen(
            [program, *_FLAGS.split(), f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = self._port(profile / "DevToolsActivePort")
            self._socket = socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE)
            self._stream = self._socket.makefile("rb")
            self._shake_hands(port)
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        self._process.terminate()
        self._process.wait(_PATIENCE)

    def _port(self, file: Path) -> int:
        """Wait for the file in which the browser says where it listens."""
        ends = time.monotonic() + _PATIENCE
        while time.monotonic() < ends:
            if file.exists() and "\n" in (text := file.read_text()):
                return int(text.split("\n")[0])
            time.sleep(0.05)
        raise TimeoutError("chromium does not say where it listens")

    def _shake_hands(self, port: int) -> None:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://127.0.0.1:{port}/json", timeout=_PATIENCE) as answer:
            tabs = json.loads(answer.read())
        (address, *_) = (tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        head = {
            "Host": f"127.0.0.1:{port}",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
            "Sec-WebSocket-Version": "13",
        }
        lines = [f"GET {address.split(str(port), 1)[1]} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in head.items()]
        self._socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        while self._stream.readline().strip():
            pass

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Return what a method of the protocol answers; raise `RuntimeError` if it refuses."""
        self._number += 1
        text = json.dumps({"id": self._number, "method": method, "params": params}).encode()
        # A client masks what it sends; a mask of zeros leaves it as it is.
        if len(text) < 126:
            size = struct.pack("!BB", 0x81, 0x80 | len(text))
        else:
            size = struct.pack("!BBH", 0x81, 0x80 | 126, len(text))
        self._socket.sendall(size + bytes(4) + text)
        while (found := self._message()).get("id") != self._number:
            self.events.append(found)
        if "error" in found:
            raise RuntimeError(found["error"])
        result: dict[str, Any] = found["result"]
        return result

    def _message(self) -> dict[str, Any]:
        text, is_last = b"", False
        while not is_last:
            first, second = self._stream.read(2)
            size, is_last = second & 0x7F, bool(first & 0x80)
            if size >= 126:
                size = int.from_bytes(self._stream.read(2 if size == 126 else 8))
            text += self._stream.read(size)
        found: dict[str, Any] = json.loads(text)
        return found

    def open(self, address: str) -> None:
        """Load a page, and wait for all of it."""
        self.events.clear()
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        ends = time.monotonic() + _PATIENCE
        while self.js("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < ends, f"{address} does not load"
            time.sleep(0.05)

    def js(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def look(self, scheme: str, width: int, height: int = 800) -> None:
        """Show pages in a `scheme`, light or dark, in a window of a size."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )

    def screenshot(self) -> bytes:
        """Return the window as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    @property
    def complaints(self) -> list[str]:
        """Errors, warnings and messages of the page since it was opened."""
        kinds = {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}
        return [json.dumps(one["params"]) for one in self.events if one["method"] in kinds]

    @property
    def requests(self) -> list[str]:
        """The addresses that the page has asked for since it was opened."""
        asked = [
            one["params"] for one in self.events if one["method"] == "Network.requestWillBeSent"
        ]
        return [one["request"]["url"] for one in asked]
