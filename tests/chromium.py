"""A browser for the tests of pages: Chromium without a window; the fixture `browser` skips where there is none."""

import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37}


class Browser:
    """Chromium without a window, driven through the pipe of its DevTools protocol: no driver, no port, no network."""

    FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--remote-debugging-pipe"]  # fmt: skip

    def __init__(self, profile: Path):
        command_in, command_out = os.pipe()
        answer_in, answer_out = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4: ours must be out of the way before.
        ours = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (command_in, answer_out)]
        redirect = f'exec "$@" 3<&{ours[0]} 4>&{ours[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", CHROMIUM, *self.FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=ours, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (command_in, answer_out, *ours):
            os.close(end)
        self.commands, self.answers, self.unread = command_out, answer_in, b""
        self.numbers, self.session, self.events = itertools.count(1), None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self.session = None
        self.call("Browser.close")
        self.process.wait(timeout=20)
        os.close(self.commands)
        os.close(self.answers)

    def read(self) -> dict:
        """The next message; fails where none comes for 30 seconds."""
        while b"\0" not in self.unread:
            assert select.select([self.answers], [], [], 30)[0], "Chromium is silent"
            chunk = os.read(self.answers, 1 << 20)
            assert chunk, "Chromium has ended"
            self.unread += chunk
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **params) -> dict:
        """A command's result; events that come meanwhile are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def open(self, page: Path | str, width: int = 1280, dark: bool = False) -> None:
        """Load a page from its file or address, on a screen of this width in CSS pixels, a phone's below 500."""
        phone = width < 500
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def evaluate(self, expression: str):
        """The value of an expression in the page, after its promise where it is one."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[dict]:
        """What the console would show in red, and what broke."""
        self.evaluate("0")  # what has happened so far has then been said
        return [event for event in self.events if event.get("method") == "Runtime.exceptionThrown"
                or event.get("params", {}).get("entry", {}).get("level") in ("error", "warning")
                or event.get("params", {}).get("type") in ("error", "warning", "assert")]  # fmt: skip

    def requests(self) -> list[str]:
        """Whatever was loaded, except for what the page carries itself."""
        urls = [event["params"]["request"]["url"] for event in self.events
                if event.get("method") == "Network.requestWillBeSent"]  # fmt: skip
        return [url for url in urls if not url.startswith("data:")]

    def point_at(self, selector: str, across: float, kind: str = "mouseMoved") -> None:
        """Move the mouse to the middle of an element's height, at a fraction of its width."""
        self.evaluate(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
        left, top, width, height = self.evaluate(
            f"(({{x, y, width, height}}) => [x, y, width, height])"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        self.call("Input.dispatchMouseEvent", type=kind, x=left + across * width, y=top + height / 2)

    def press(self, key: str) -> None:
        typed = {"text": "\r"} if key == "Enter" else {}  # without it no button is pressed
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key], **typed)
