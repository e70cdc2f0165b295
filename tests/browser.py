"""A headless Chromium that tests drive over the DevTools protocol, through two pipes: it needs no port and no library.

https://chromedevtools.github.io/devtools-protocol/ documents the methods.
"""

import base64
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")  # scripts/test.sh has them, too
SECONDS = 120  # without an answer; a busy machine takes long to start it
OPTIONS = [
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # which root has to do without
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-renderer-backgrounding",  # which would lower its priority
    "--proxy-server=127.0.0.1:9",  # where nothing listens
    "--window-size=1100,1000",
    "--hide-scrollbars",
]


def find() -> str | None:
    """The program of the browser; None where there is none."""
    return next((program for program in map(shutil.which, NAMES) if program is not None), None)


class Page:
    """A tab of the browser.

    Attributes:
        problems: errors of scripts, and what the console shows as an error or a warning.
        requests: the addresses that were asked for.
    """

    def __init__(self, commands: BinaryIO, answers: BinaryIO):
        self.commands, self.answers = commands, answers
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.session, self.count, self.read, self.loaded = None, 0, b"", False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict:
        """The result of a method of the protocol."""
        self.count += 1
        request = {"id": self.count, "method": method, "params": parameters}
        request |= {"sessionId": self.session} if self.session is not None else {}
        self.commands.write(json.dumps(request).encode() + b"\0")
        self.commands.flush()
        while (message := self.next_message()).get("id") != self.count:
            self.note(message)
        assert "error" not in message, message
        return message["result"]

    def next_message(self) -> dict:
        while b"\0" not in self.read:
            ready, _, _ = select.select([self.answers], [], [], SECONDS)
            assert ready, "the browser does not answer"
            new = os.read(self.answers.fileno(), 2**20)
            assert new, "the browser has ended"
            self.read += new
        message, _, self.read = self.read.partition(b"\0")
        return json.loads(message)

    def note(self, event: dict) -> None:
        details = event.get("params", {})
        match event["method"]:
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(details["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if details["type"] in ("error", "warning", "assert"):
                self.problems.append(json.dumps(details["args"]))
            case "Log.entryAdded" if details["entry"]["level"] in ("error", "warning"):
                self.problems.append(json.dumps(details["entry"]))
            case "Network.requestWillBeSent":
                self.requests.append(details["request"]["url"])
            case "Page.loadEventFired":
                self.loaded = True

    def open(self, path: Path) -> None:
        """Open a file, and wait until it has been loaded and drawn."""
        self.loaded = False
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not self.loaded:
            self.note(self.next_message())
        self.drawn()

    def drawn(self) -> None:
        """Wait until what was changed is on the screen."""
        self.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def value(self, expression: str) -> object:
        """The value of a JavaScript expression, or what its promise resolves to, as plain data."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until an expression is true."""
        self.value(
            f"new Promise((done) => {{ const look = () => {condition} ? done() : setTimeout(look, 20); look(); }})"
        )

    def middle(self, element: str) -> tuple[float, float]:
        """The middle of an element, given as an expression, on the screen; it is scrolled to."""
        box = f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center'}}); "
        box += "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()"
        return tuple(self.value(box))

    def point_at(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.drawn()

    def click(self, element: str) -> None:
        """Click on the middle of an element, given as an expression."""
        x, y = self.middle(element)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.drawn()

    def press(self, key: str, code: int) -> None:
        """Press a key, with its Windows code, in the element that has the focus."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)
        self.drawn()

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def browsing(program: str, folder: Path) -> Iterator[Page]:
    """A page of a new browser.

    Args:
        folder: for its profile; new.
    """
    (child_in, commands), (answers, child_out) = os.pipe(), os.pipe()
    # the browser reads from descriptor 3 and writes to 4
    command = ["bash", "-c", f'exec "$@" 3<&{child_in} 4>&{child_out}', "bash", program, *OPTIONS]
    command.append(f"--user-data-dir={folder}")
    with (
        open(commands, "wb") as to_browser,
        open(answers, "rb", buffering=0) as from_browser,
        (folder.parent / f"{folder.name}.log").open("wb") as log,
        subprocess.Popen(command, pass_fds=(child_in, child_out), stdout=log, stderr=log) as process,
    ):
        os.close(child_in)
        os.close(child_out)
        try:
            page = Page(to_browser, from_browser)
            yield page
            page.session = None
            page.call("Browser.close")
            process.wait(SECONDS)
        finally:
            process.kill()
