"""A headless Chromium for tests, driven over its debugging pipe: it waits for what a page shows, and keeps its errors."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)
WAIT_S = 120.0
FIRST_FREE = 10  # so that the pipe's ends are not 3 and 4 already, which Chromium wants


class Browser:
    """One page. `errors` holds what its console and its scripts complained of; `on` is called with events by name."""

    def __init__(self, to: int, back: int) -> None:
        self.errors: list[Any] = []
        self.on: dict[str, Callable[[Any], object]] = {}
        self._to, self._back = to, back
        self._buffer = b""
        self._number = 0
        self._session: str | None = None

    def start(self) -> None:
        page = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self._call(f"{domain}.enable")

    def open(self, url: str, *, width: int = 1440, height: int = 1000, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        size: dict[str, Any] = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **size)
        self._call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def value(self, script: str) -> Any:
        """The value of an expression on the page."""
        found = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> Any:
        """Wait until an expression is true, and return its value. One that fails, because the page loads, is not."""
        end_s = time.monotonic() + WAIT_S
        tolerant = f"(() => {{ try {{ return {script}; }} catch {{ return false; }} }})()"
        while True:
            told = self._told("Runtime.evaluate", expression=tolerant, returnByValue=True)
            if found := told.get("result", {}).get("result", {}).get("value"):
                return found
            assert time.monotonic() < end_s, f"not within {WAIT_S:g} s: {script}: {told}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press and release a key by its name."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key)

    def command(self, method: str, *, whole: bool = False, **parameters: Any) -> Any:
        """Send a command of the protocol for the page, or for the whole browser."""
        session, self._session = self._session, None if whole else self._session
        try:
            return self._call(method, **parameters)
        finally:
            self._session = session

    def _call(self, method: str, **parameters: Any) -> Any:
        told = self._told(method, **parameters)
        assert "error" not in told, told
        return told["result"]

    def _told(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        asked = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            asked["sessionId"] = self._session
        os.write(self._to, json.dumps(asked).encode() + b"\0")
        while True:
            told = self._next()
            if is_error(told):
                self.errors.append(told["params"])
            if (heard := self.on.get(told.get("method", ""))) is not None:
                heard(told["params"])
            if told.get("id") == self._number:
                return told

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._back, 1 << 16)
            assert chunk, "the browser has ended"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


def is_error(told: dict[str, Any]) -> bool:
    """Whether the browser tells of an exception, of what it complains of itself, or of a script's own console.error."""
    match told.get("method"):
        case "Runtime.exceptionThrown" | "Log.entryAdded":
            return True
        case "Runtime.consoleAPICalled":
            return bool(told["params"]["type"] in ("error", "assert"))
    return False


@contextmanager
def browser(folder: Path, *, expected: str = "") -> Iterator[Browser]:
    """Run a browser whose profile lies in `folder`. An error on its console fails the test, unless it is `expected`.

    That is a regular expression of the errors that a test brings about.
    """
    assert CHROMIUM is not None
    pipes = [*os.pipe(), *os.pipe()]
    theirs_in, to, back, theirs_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE) for end in pipes)
    for end in pipes:
        os.close(end)

    def place() -> None:
        os.dup2(theirs_in, 3)
        os.dup2(theirs_out, 4)

    process = subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder}"],
        stderr=subprocess.DEVNULL,
        pass_fds=(3, 4),
        preexec_fn=place,  # noqa: PLW1509 - nothing else runs in the child
    )
    for end in (theirs_in, theirs_out):
        os.close(end)
    try:
        found = Browser(to, back)
        found.start()
        yield found
        found.value("0")  # what it has told so far is read
        wrong = [error for error in found.errors if not (expected and re.search(expected, json.dumps(error)))]
        assert not wrong, wrong
    finally:
        process.kill()
        process.wait()
        for end in (to, back):
            os.close(end)
