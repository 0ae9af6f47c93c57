"""A headless Chromium, driven through its own debugging protocol."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")


class Tab:
    """One page."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._asked = socket, 0

    def ask(self, method: str, **params: Any) -> Any:
        """What the protocol answers to ``method``."""
        self._asked += 1
        self._socket.send(json.dumps({"id": self._asked, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(60))
            if message.get("id") == self._asked:
                assert "error" not in message, message
                return message["result"]

    def value(self, script: str) -> Any:
        """What ``script`` gives in the page."""
        answer = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 60.0) -> None:
        """Wait until ``script`` is true in the page."""
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, (
                f"{script} has not come true; {self.value('document.body.innerText')}"
            )
            time.sleep(0.05)

    def picture(self, path: Path) -> None:
        """Write the page as PNG."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def opened(url: str, folder: Path, *, size: tuple[int, int] = (1200, 760)) -> Iterator[Tab]:
    """The page at ``url``; the browser's files go to ``folder``."""
    from websockets.sync.client import connect

    assert CHROMIUM is not None
    window = f"--window-size={size[0]},{size[1]}"
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *_FLAGS, window, profile, "--remote-debugging-port=0", "about:blank"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stderr is not None
            said = (re.search(r"ws://\S+", line) for line in process.stderr)
            found = next(match for match in said if match is not None)
            with connect(found[0], max_size=2**26) as socket:
                browser = Tab(socket)
                made = browser.ask("Target.createTarget", url=url)["targetId"]
                host = found[0].partition("/devtools/")[0]
                with connect(f"{host}/devtools/page/{made}", max_size=2**26) as page:
                    yield Tab(page)
        finally:
            process.terminate()
