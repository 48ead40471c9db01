"""A page as Chromium shows it: what it requested, what went wrong, how large it is, and a picture of it.

``python -m tests.support.browser PAGE.html PICTURE.png`` prints the first three and writes the fourth; with a number of
pixels as third argument the picture has only so much of the page's height. With it the picture in README.md is made.

Speaks the DevTools protocol through pipes: JSON messages that end in a zero byte, on the descriptors 3 and 4.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_SECONDS = 400
_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")
_QUIET = (
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--no-default-browser-check",
)
_LAYOUT = """JSON.stringify({
  height: document.documentElement.scrollHeight,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  drawn: [...document.querySelectorAll('svg')].filter(one => one.getBoundingClientRect().height > 20).length,
  clipped: [...document.querySelectorAll('svg text')].filter(one => {
    const text = one.getBoundingClientRect(), picture = one.closest('svg').getBoundingClientRect();
    return text.left < picture.left - 1 || text.right > picture.right + 1 ||
      text.top < picture.top - 1 || text.bottom > picture.bottom + 1;
  }).map(one => one.textContent),
})"""


@dataclass
class Seen:
    """``requests``: URLs other than the page's own. ``problems``: errors and warnings of the console, of scripts and of
    loading. ``overflow``: pixels by which the page is too wide. ``drawn``: pictures that have a size. ``clipped``:
    texts that reach out of their picture. ``png``: the whole page."""

    requests: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    height: int = 0
    overflow: int = 0
    drawn: int = 0
    clipped: list[str] = field(default_factory=list)
    png: bytes = b""


def chromium() -> str | None:
    """The path of the browser (Debian package chromium), or None."""
    return shutil.which("chromium")


def require_chromium() -> None:
    """Skip the test where there is no browser; with QVTUNE_REQUIRE_BROWSER=1 fail it."""
    if chromium() is None:
        wanted = os.environ.get("QVTUNE_REQUIRE_BROWSER") == "1"
        (pytest.fail if wanted else pytest.skip)("Chromium is not installed (Debian package chromium)")


def look_at(page: Path, width: int = 1400, height: int | None = None) -> Seen:
    """Open a page in a window that is ``width`` pixels wide; the picture has ``height`` pixels, or all of them."""
    with _browser() as browser:
        browser.call("Target.setDiscoverTargets", discover=True)
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        browser.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            browser.call(f"{domain}.enable")
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        browser.call("Page.navigate", url=page.resolve().as_uri())
        browser.wait_for("Page.loadEventFired")
        layout = browser.call("Runtime.evaluate", expression=_LAYOUT, awaitPromise=True)
        seen = Seen(**json.loads(layout["result"]["value"]))
        clip = {"x": 0, "y": 0, "width": width, "height": height or seen.height, "scale": 1}
        picture = browser.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        seen.png = base64.b64decode(picture["data"])
        _sort(browser.events, page.resolve().as_uri(), seen)
    return seen


def _sort(events: list[dict[str, Any]], own: str, seen: Seen) -> None:
    for event in events:
        method, values = event["method"], event["params"]
        if method == "Network.requestWillBeSent" and values["request"]["url"] != own:
            seen.requests.append(values["request"]["url"])
        elif method in ("Runtime.exceptionThrown", "Network.loadingFailed"):
            seen.problems.append(json.dumps(values))
        elif method == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            seen.problems.append(json.dumps(values["args"]))
        elif method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            seen.problems.append(values["entry"]["text"])


class _Browser:
    def __init__(self, writer: int, reader: int) -> None:
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []
        self._writer, self._reader, self._number, self._rest = writer, reader, 0, b""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command; events that come before it are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def wait_for(self, method: str) -> None:
        """Until an event of this kind has come."""
        while not any(event["method"] == method for event in self.events):
            self.events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            received = os.read(self._reader, 2**16)
            assert received, "Chromium has ended"
            self._rest += received
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


@contextmanager
def _browser() -> Iterator[_Browser]:
    program = chromium()
    assert program is not None, "Chromium is not installed (Debian package chromium)"
    child_in, writer = os.pipe()
    reader, child_out = os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        shell = ["timeout", f"{TIMEOUT_SECONDS}", "bash", "-c", f'exec "$@" 3<&{child_in} 4>&{child_out}', "bash"]
        command = [*shell, program, *_OPTIONS, *_QUIET, f"--user-data-dir={profile}"]
        process = subprocess.Popen(command, pass_fds=(child_in, child_out), stderr=subprocess.DEVNULL)
        os.close(child_in)
        os.close(child_out)
        try:
            browser = _Browser(writer, reader)
            yield browser
            browser.session = None
            browser.call("Browser.close")
        finally:
            os.close(writer)  # it ends when its pipe does
            os.close(reader)
            process.wait()


def main() -> None:
    """See the module's documentation."""
    page, picture, *height = sys.argv[1:]
    seen = look_at(Path(page), height=int(height[0]) if height else None)
    Path(picture).write_bytes(seen.png)
    lines = [
        f"{page}: {Path(page).stat().st_size:,} bytes, {seen.drawn} pictures, {seen.height} pixels high",
        f"requests: {seen.requests or 'none'}; problems: {seen.problems or 'none'}",
        f"too wide by {seen.overflow} pixels; clipped texts: {seen.clipped or 'none'}",
        f"{picture}: {len(seen.png):,} bytes",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
