"""A page in a headless Chromium, driven by its DevTools protocol."""

import asyncio
import base64
import subprocess
import time
from contextlib import suppress

import aiohttp


class BrowserPage:
    """One page; its methods wait for the browser.

    Args:
        browser: the program.
        folder: for its profile.
    """

    def __init__(self, browser, folder):
        self._loop = asyncio.new_event_loop()
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "about:blank"]
        options = ["--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}", "--no-first-run"]
        self._process = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)
        port_file = folder / "profile" / "DevToolsActivePort"
        wait_for(lambda: port_file.exists() and port_file.read_text().count("\n"))
        self._loop.run_until_complete(self._connect(port_file.read_text().split()[0]))
        self._number = 0
        self.send("Page.enable")

    async def _connect(self, port):
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json") as response:
            pages = await response.json()
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        self._socket = await self._session.ws_connect(address, max_msg_size=0)

    def send(self, method, **parameters):
        return self._loop.run_until_complete(asyncio.wait_for(self._send(method, parameters), 60))

    async def _send(self, method, parameters):
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            answer = await self._socket.receive_json()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, address):
        self.send("Page.navigate", url=address)

    def run(self, script):
        """Return what a script's last expression, or its promise, is."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script):
        """Wait until a script says something true, and return that."""
        return wait_for(lambda: self.run(script))

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            code = {"Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowDown": 40, "ArrowUp": 38}.get(key, 0)
            self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def write(self, text):
        self.send("Input.insertText", text=text)

    def look(self, path, *, width, height, scheme="light"):
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        time.sleep(0.5)
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def close(self):
        with suppress(Exception):
            self._loop.run_until_complete(self._socket.close())
            self._loop.run_until_complete(self._session.close())
        self._process.terminate()
        self._process.wait(30)
        self._loop.close()


def wait_for(ask, *, seconds=60.0):
    """Ask until the answer is true, and return it."""
    end = time.monotonic() + seconds
    while not (found := ask()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return found
