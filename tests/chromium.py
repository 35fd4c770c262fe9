"""Pages in a headless Chromium, over the DevTools protocol and a pair of pipes: nothing but the standard library."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

QUIET = (  # without these it calls home
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
)  # fmt: skip


class Chromium:
    """A browser with one page open at a time, and all that the page asked for or complained about."""

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        self._commands, self._answers, self._last = commands, answers, 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def open(self, page: Path, *, width: int, scheme: str) -> None:
        """Load a page at a width in pixels, for a reader who likes it `light` or `dark`."""
        self.requests.clear()
        self.complaints.clear()
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=page.as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, script: str) -> Any:
        """A JavaScript expression in the page; its value as JSON."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and what it gives."""
        self._last += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._last, "method": method, "params": parameters, **session}
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while (answer := self._read()).get("id") != self._last:
            pass
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> dict[str, Any]:
        """The next message; what is said of requests and complaints is kept."""
        text = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            text += byte
        message: dict[str, Any] = json.loads(text)
        said = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(said["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(said["entry"]["text"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(said))
        return message


def why_no_chromium() -> str | None:
    """What to say where there is none."""
    return None if shutil.which("chromium") else "Chromium is not installed"


@contextmanager
def chromium(profile: Path) -> Iterator[Chromium]:
    """A running browser with an empty profile."""
    binary = shutil.which("chromium")
    assert binary
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]

    def place() -> None:
        """It reads commands from 3 and answers on 4."""
        for number, fd in zip((3, 4), theirs, strict=True):
            os.dup2(fd, number)

    process = subprocess.Popen(
        [binary, *QUIET, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
        preexec_fn=place,
        close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for fd in (theirs_in, theirs_out, *theirs):
        os.close(fd)
    try:
        with os.fdopen(ours_out, "wb") as commands, os.fdopen(ours_in, "rb") as answers:
            browser = Chromium(commands, answers)
            yield browser
            browser._session = None
            with suppress(AssertionError):
                browser.call("Browser.close")
    finally:
        process.terminate()
        process.wait(timeout=30)
