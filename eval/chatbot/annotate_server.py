"""The web server that raters' pages talk to: on loopback only, and for its own page only.

Another web page in the rater's browser can send requests here too. It is kept out three times: by the Host header
(its own name, even if made to point here), by the Origin header, and by a token that stands in the page, which it
cannot read. Texts of models reach the browser as JSON and are shown as text; should one ever be taken for HTML, the
Content-Security-Policy lets no script run that is not the page's own file.
"""

import json
import socket
import sys
from collections.abc import Callable
from hashlib import blake2b
from hmac import compare_digest
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from eval.chatbot.annotate_desk import Desk, Rejected
from models import ConfigError
from models.errors import WriteError

LOOPBACK = "127.0.0.1"
HOSTS = (LOOPBACK, "localhost")  # with any port: a tunnel to here may have another at its other end
PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("annotate.html", "text/html; charset=utf-8"),
    "/annotate.css": ("annotate.css", "text/css; charset=utf-8"),
    "/annotate.js": ("annotate.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
LONGEST = 2**16  # bytes of a request; a vote has some two hundred
SECONDS = 60  # that a connection may be silent


class AnnotationServer(ThreadingHTTPServer):
    """A desk on the web, each connection in a thread of its own."""

    daemon_threads = True

    def __init__(self, desk: Desk, port: int, complain: Callable[[str], None] = print) -> None:
        self.desk, self.complain = desk, complain
        self.page_token = blake2b(b"page", key=desk.votes.secret, digest_size=16).hexdigest()
        self.files = {path: ((PAGE / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}
        html, kind = self.files["/"]
        self.files["/"] = html.replace(b"{token}", self.page_token.encode()), kind
        try:
            super().__init__((LOOPBACK, port), Handler)
        except OSError as error:
            raise ConfigError(f"port {port}: {error.strerror}; --port 0 takes any that is free") from error

    @property
    def address(self) -> str:
        """Where raters go."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def server_bind(self) -> None:
        """Without the lookup of the host's name that the standard library makes, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = self.socket.getsockname()[:2]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle is no news; anything else is."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "qlora", ""
    timeout = SECONDS

    @property
    def annotation(self) -> AnnotationServer:
        assert isinstance(self.server, AnnotationServer)
        return self.server

    def do_GET(self) -> None:
        try:
            self.check_host()
            content, kind = self.annotation.files.get(self.path.partition("?")[0], (None, ""))
            if content is None:
                raise Rejected(HTTPStatus.NOT_FOUND, "There is nothing here.")
            self.send(HTTPStatus.OK, content, kind)
        except Rejected as rejected:
            self.refuse(rejected)

    def do_POST(self) -> None:
        try:
            self.check_host()
            self.check_origin()
            asked = self.body()
            self.check_token()
            answer = self.act(asked)
            self.send(HTTPStatus.OK, json.dumps(answer).encode(), "application/json")
        except Rejected as rejected:
            self.refuse(rejected)
        except WriteError as error:
            self.annotation.complain(str(error))
            self.refuse(
                Rejected(HTTPStatus.INSUFFICIENT_STORAGE, "The vote could not be kept: the disk takes no more.")
            )

    def act(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Do what the page asks for."""
        desk, rater = self.annotation.desk, of_type(asked, "rater", str)
        if self.path == "/next":
            return desk.next(rater)
        if self.path == "/vote":
            return desk.vote(rater, of_type(asked, "item", str), of_type(asked, "score", int))
        if self.path == "/undo":
            return desk.undo(rater)
        raise Rejected(HTTPStatus.NOT_FOUND, "There is nothing here.")

    def check_host(self) -> None:
        """Only who came by a name of this machine's own."""
        name, _, port = self.headers.get("Host", "").partition(":")
        if name not in HOSTS or not (port.isdecimal() or not port):
            raise Rejected(HTTPStatus.FORBIDDEN, "This server is for pages on this machine.")

    def check_origin(self) -> None:
        """Only requests that come from the page itself, from no other."""
        if self.headers.get("Origin") != f"http://{self.headers.get('Host')}":
            raise Rejected(HTTPStatus.FORBIDDEN, "This request came from another page.")

    def check_token(self) -> None:
        if not compare_digest(self.headers.get("X-Token", "").encode(), self.annotation.page_token.encode()):
            raise Rejected(HTTPStatus.FORBIDDEN, "This page belongs to other votes; reload it.")

    def body(self) -> dict[str, Any]:
        """The JSON object that was sent."""
        if self.headers.get_content_type() != "application/json":
            raise Rejected(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "JSON is expected.")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise Rejected(HTTPStatus.LENGTH_REQUIRED, "A length is expected.")
        if int(length) > LONGEST:
            raise Rejected(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "This is too long.")
        try:
            asked = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            asked = None
        if not isinstance(asked, dict):
            raise Rejected(HTTPStatus.BAD_REQUEST, "A JSON object is expected.")
        return asked

    def refuse(self, rejected: Rejected) -> None:
        """Say why not; what was sent may be unread, so the connection ends."""
        self.close_connection = True
        content = json.dumps({"error": str(rejected)}).encode()
        self.send(rejected.status, content, "application/json")

    def send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def end_headers(self) -> None:
        """Every response has them, those of the standard library too."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not news."""


def of_type(asked: dict[str, Any], name: str, kind: type) -> Any:
    """A field of a request."""
    value = asked.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise Rejected(HTTPStatus.BAD_REQUEST, f"{name} is missing.")
    return value
