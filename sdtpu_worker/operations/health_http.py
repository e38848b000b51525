"""The HTTP endpoint `/livez`, `/readyz` and `/metrics` (`sdtpu_health_address`), and the client of `sdtpu health`."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, BinaryIO

from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.operations.health import Check

logger = logging.getLogger(__name__)

Probe = Callable[[], list[Check]]
Page = Callable[[str], tuple[str, bytes]]
"""Returns the type of a page's content and the content, for the header `Accept` of the request."""

_CLIENT_S = 5.0  # seconds that a client has, from its connection to its answer
_MAX_CLIENTS = 16  # at the same time
_MAX_REQUEST_BYTES = 8192
_EVERY_INTERFACE = ("", "0.0.0.0", "::")


def format_address(address: tuple[str, int]) -> str:
    """Return `host:port`, as `sdtpu_health_address` takes it."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def ask_health(address: tuple[str, int], path: str, timeout_s: float = 5.0) -> tuple[bool, list[Check]]:
    """Ask a worker's endpoint for a verdict; a proxy in the environment is not used.

    Args:
        address: host and port where the worker listens; an address that means every interface is asked on loopback.
        path: `/livez` or `/readyz`.
        timeout_s: seconds for the connection and for each part of the answer.

    Returns:
        The verdict, and the checks behind it.

    Raises:
        ConnectionError: nothing listens there, or it does not answer as a worker does.
    """
    host, port = address
    host = ("::1" if host == "::" else "127.0.0.1") if host in _EVERY_INTERFACE else host
    try:
        with contextlib.closing(http.client.HTTPConnection(host, port, timeout=timeout_s)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            checks = json.loads(response.read(65_536))["checks"]
        found = [Check(name, bool(check["ok"]), str(check["detail"])) for name, check in checks.items()]
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as exc:
        raise ConnectionError(f"no worker answers on http://{format_address((host, port))}{path}: {exc!r}") from exc
    return response.status == 200, found


class HealthServer:
    """Answers `/livez`, `/readyz` and further pages from threads of its own, until it is closed.

    Args:
        address: host and port; an empty host means every interface, port 0 any free port.
        live: returns the checks of `/livez`, without waiting. An exception counts as a failing check.
        ready: returns the checks of `/readyz` likewise.
        pages: further pages by path.
        named_by: the setting or option that names the address, for errors.

    Attributes:
        address: the host and port that the server listens on.

    Raises:
        ConfigurationError: the address is in use, or does not belong to this host.
    """

    def __init__(
        self,
        address: tuple[str, int],
        live: Probe,
        ready: Probe,
        pages: Mapping[str, Page] | None = None,
        named_by: str = "sdtpu_health_address",
    ) -> None:
        try:
            self._server = _Server(address, {"/livez": live, "/readyz": ready}, pages or {})
        except OSError as exc:
            remedy = "another process listens there; choose another port" if exc.errno == errno.EADDRINUSE else exc
            raise ConfigurationError(f"{named_by}: cannot listen on {format_address(address)}: {remedy}") from exc
        self.address: tuple[str, int] = self._server.server_address[:2]  # type: ignore[assignment]  # typed for any socket
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="sdtpu-health", daemon=True
        )
        self._thread.start()
        logger.info("health: http://%s with %s", format_address(self.address), " ".join(self._server.all_paths))

    def close(self) -> None:
        """Stop listening and hang up on connected clients. Safe to call again."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server.drop_clients(older_than_s=0)


class _Server(ThreadingHTTPServer):
    """Serves each client in a thread, for a limited time; hangs up on the oldest when too many are connected."""

    daemon_threads = True
    allow_reuse_port = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], paths: Mapping[str, Probe], pages: Mapping[str, Page]) -> None:
        host, port = address
        dual = host in ("", "::") and socket.has_dualstack_ipv6()
        host = "::" if dual else host or "0.0.0.0"
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family, self._dual = found[0], dual
        self.paths, self.pages, self.all_paths = paths, pages, (*paths, *pages)
        self._clients: dict[socket.socket, float] = {}  # oldest first
        self._lock = threading.Lock()
        super().__init__(found[4][:2], _Handler)  # type: ignore[arg-type]  # typed for any socket

    def server_bind(self) -> None:
        """Bind without asking DNS for the host's name, as HTTPServer would."""
        if self._dual:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]  # as above

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a client in a thread of its own."""
        with self._lock:
            if len(self._clients) >= _MAX_CLIENTS:
                oldest = next(iter(self._clients))
                _hang_up(oldest)
                del self._clients[oldest]
            self._clients[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Hang up on clients whose time is over, however slowly they send; runs every `poll_interval` or more often."""
        self.drop_clients(_CLIENT_S)

    def drop_clients(self, older_than_s: float) -> None:
        """Hang up on clients that have been connected for this time; their threads then end."""
        with self._lock:
            for request, since in self._clients.items():
                if time.monotonic() - since >= older_than_s:
                    _hang_up(request)

    def close_request(self, request: Any) -> None:
        """Close and forget a client, under the lock: no thread may hang up on a file number that is in use anew."""
        with self._lock:
            self._clients.pop(request, None)
            super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a client that went away at DEBUG only: it is not an error of the worker."""
        logger.debug("health: client %s", client_address, exc_info=True)


def _hang_up(client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)


class _Lines:
    """Reads a request's lines up to a number of bytes, and then reports the end of the stream."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream, self._left = stream, limit

    def readline(self, size: int) -> bytes:
        line = self._stream.readline(min(size, self._left))
        self._left -= len(line)
        return line

    def close(self) -> None:
        self._stream.close()


class _Handler(BaseHTTPRequestHandler):
    """Answers one request and closes the connection."""

    server: _Server
    server_version, sys_version = "sdtpu_worker", ""
    timeout = _CLIENT_S

    def setup(self) -> None:
        """Limit how many bytes of a request are read."""
        super().setup()
        self.rfile = _Lines(self.rfile, _MAX_REQUEST_BYTES)  # type: ignore[assignment, arg-type]  # what is used

    def do_GET(self) -> None:  # the standard library's name
        """Answer with the verdict and its checks, or with a page."""
        path = self.path.partition("?")[0]
        if page := self.server.pages.get(path):
            self._answer_page(page)
            return
        probe = self.server.paths.get(path)
        if probe is None:
            self.send_error(404)
            return
        try:
            checks = probe()
        except Exception as exc:
            logger.warning("health: %s failed", self.path, exc_info=True)
            checks = [Check("health", False, f"the check itself raised an error: {exc!r}")]
        ok = all(check.ok for check in checks)
        found = {check.name: {"ok": check.ok, "detail": check.detail} for check in checks}
        self._answer(200 if ok else 503, {"status": "ok" if ok else "failing", "checks": found})

    do_HEAD = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with an error in JSON; a method other than GET and HEAD is answered with 404 as well."""
        paths = " or ".join(f"GET {path}" for path in self.server.all_paths)
        self._answer(404 if code == 501 else code, {"status": f"not found: ask {paths}", "checks": {}})

    def _answer_page(self, page: Page) -> None:
        try:
            content_type, body = page(self.headers.get("Accept", ""))
        except Exception as exc:
            logger.warning("health: %s failed", self.path, exc_info=True)
            self._answer(500, {"status": f"the page itself raised an error: {exc!r}", "checks": {}})
            return
        self._send(200, content_type, body)

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        self._send(code, "application/json", json.dumps(content).encode() + b"\n")

    def _send(self, code: int, content_type: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log requests at DEBUG only."""
        logger.debug("health: %s %s", self.client_address[0], format % args)
