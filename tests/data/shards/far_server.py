"""A server of files that counts what it is asked for and fails on demand."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FarServer:
    """Files by path; `faults` are names of what goes wrong with the next requests, one each: of those for
    content, or, with `fails_heads`, of all."""

    fails_heads = False

    def __init__(self):
        self.files, self.asked, self.faults = {}, [], []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"far": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def num_asked(self):
        return len(self.asked)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    far: FarServer

    def log_message(self, *_): ...

    def do_HEAD(self):
        self._answer(with_content=False)

    def do_GET(self):
        self._answer(with_content=True)

    def _answer(self, *, with_content):
        self.far.asked.append((self.command, self.path, self.headers.get("Range", "")))
        fault = self.far.faults.pop(0) if self.far.faults and (with_content or self.far.fails_heads) else ""
        content = self.far.files.get(self.path)
        if fault == "late":
            time.sleep(0.2)
        if fault == "busy" or content is None:
            self.send_error(503 if fault == "busy" else 404)
            return
        if fault == "hang up":
            self.close_connection = True
            return
        wanted = self.headers.get("Range", "")
        start, _, last = wanted.removeprefix("bytes=").partition("-")
        part = content[int(start) : int(last) + 1] if wanted else content
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hash(content)}"')
        self.send_header("Content-Length", str(len(part) // 2 if fault == "half, as if whole" else len(part)))
        self.end_headers()
        if with_content:
            self.wfile.write(part[: len(part) // 2] if fault.startswith("half") else part)
            self.close_connection = fault.startswith("half")


@contextmanager
def far_server():
    """Serve until the block ends."""
    far = FarServer()
    thread = threading.Thread(target=far.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield far
    finally:
        far.server.shutdown()
        far.server.server_close()
        thread.join()
