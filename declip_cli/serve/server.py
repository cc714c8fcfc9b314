"""The server of the search page, for this machine alone.

It listens on 127.0.0.1, answers only addresses that begin with a token drawn at its start, only under its own name
(a page elsewhere could point its name at 127.0.0.1), fetches nothing, and takes numbers of images, never paths.
"""

import json
import secrets
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

from declip_cli.assets import asset_path
from declip_cli.errors import EvaluateError
from declip_cli.serve.searcher import Request, RequestError, Searcher

MAX_BODY_BYTES = 2**25
"""Of an image that is searched with."""
_HOST = "127.0.0.1"
_TIMEOUT_S = 30
"""After which a client that says nothing more is left."""
_MAX_WORDS = 64
"""In one address."""
_PAGE_FILES = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_KEEP = {"Cache-Control": "private, max-age=86400, immutable"}
"""For images: their numbers never change under one token."""


class SearchServer(ThreadingHTTPServer):
    """Serves the search page on 127.0.0.1, a thread a connection.

    Args:
        searcher: answers.
        port: 0 takes a free one.
        log: receives unexpected errors.

    Raises:
        EvaluateError: the port cannot be used.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, searcher: Searcher, *, port: int = 0, log: Callable[[str], None]) -> None:
        self.searcher, self.token, self.log = searcher, secrets.token_urlsafe(16), log
        self.files = {
            name: (asset_path(f"serve/{file}").read_bytes(), kind) for name, (file, kind) in _PAGE_FILES.items()
        }
        try:
            super().__init__((_HOST, port), _Handler)
        except OSError as error:
            raise EvaluateError(
                f"cannot listen on port {port} of {_HOST}: {error.strerror}", remedy="--port 0 picks a free port"
            ) from error

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names that a client may call this server by."""
        return f"{_HOST}:{self.server_port}", f"localhost:{self.server_port}"

    @property
    def address(self) -> str:
        """What to open in a browser; with `search?text=…` behind it, hits as JSON."""
        return f"http://{_HOST}:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        """Say nothing of clients that hang up; errors of answers are reported where they occur."""


class _Handler(BaseHTTPRequestHandler):
    server: SearchServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "declip", ""
    timeout = _TIMEOUT_S

    def log_message(self, *_: Any) -> None:  # noqa: ANN401
        """Keep quiet."""

    def do_GET(self) -> None:
        """Send the page, hits, or an image."""
        self._answer(b"")

    def do_POST(self) -> None:
        """Send hits for the image in the body."""
        self._answer(None)

    def _answer(self, body: bytes | None) -> None:
        """Check who asks, then answer; a body that is None is read once that is known."""
        if body is not None and self.headers.get("Content-Length", "0") != "0":
            self.close_connection = True  # what follows would be taken for the next request
        path, _, query = self.path.partition("?")
        token, _, name = path.removeprefix("/").partition("/")
        if self.headers.get_all("Host") not in [[host] for host in self.server.hosts]:
            return self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "the Host header is not that of this server")
        if not secrets.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            return self._refuse(HTTPStatus.FORBIDDEN, "the address needs the token that declip printed")
        if body is None:
            length = self.headers.get("Content-Length", "")
            if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
                return self._refuse(HTTPStatus.LENGTH_REQUIRED, "an image with its Content-Length is expected")
            if name != "search" or len(length) > 12 or int(length) > MAX_BODY_BYTES:
                return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"images up to {MAX_BODY_BYTES >> 20} MiB")
            body = self.rfile.read(int(length))
        try:
            send = self._found(name, query, body)
        except RequestError as error:
            send = partial(self._send_json, {"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except Exception as error:  # a fault of ours must not end the server, nor pass unnoticed
            self.server.log(f"error: a request failed: {error!r}")
            send = partial(self._send_json, {"error": "the search failed"}, HTTPStatus.INTERNAL_SERVER_ERROR)
        send()

    def _found(self, name: str, query: str, body: bytes) -> Callable[[], None]:
        """Work out an answer; what is returned sends it."""
        searcher, (kind, _, index) = self.server.searcher, name.partition("/")
        if name in self.server.files and self.path.count("/") > 1:  # addresses in the page begin behind the token
            return partial(self._send, *self.server.files[name])
        if name == "info":
            return partial(self._send_json, searcher.info())
        if name == "search":
            try:
                words = parse_qs(query, errors="strict", max_num_fields=_MAX_WORDS)
            except ValueError as error:
                raise RequestError(f"the address cannot be read: {error}") from error
            return partial(self._send_json, searcher.search(Request.parse(words, body)))
        if kind in ("thumbnails", "images") and index.isascii() and index.isdigit() and len(index) < 12:
            make = searcher.thumbnail if kind == "thumbnails" else searcher.view
            return partial(self._send, make(int(index)), "image/jpeg", more=_KEEP)
        return partial(self._send_json, {"error": "there is nothing with this name"}, HTTPStatus.NOT_FOUND)

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True  # a body may follow, unread
        self._send_json({"error": why}, status)

    def _send_json(self, content: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(content, allow_nan=False).encode(), "application/json", status)

    def _send(
        self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, *, more: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store"}
        if self.close_connection:
            headers["Connection"] = "close"
        for key, value in (headers | _HEADERS | (more or {})).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)
