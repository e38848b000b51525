"""The HTTP endpoint `/livez` and `/readyz` (`sdtpu_health_address`), and who asks it."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, BinaryIO

from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.operations.health import Check

logger = logging.getLogger(__name__)

Probe = Callable[[], list[Check]]

_CLIENT_S = 5.0  # a client's time, from its connection to its answer
_MAX_CLIENTS = 16
_MAX_REQUEST_BYTES = 8192
_EVERY_INTERFACE = ("", "0.0.0.0", "::")


def format_address(address: tuple[str, int]) -> str:
    """Return `host:port`, as `sdtpu_health_address` takes it."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def ask_health(address: tuple[str, int], path: str, timeout_s: float = 5.0) -> tuple[bool, list[Check]]:
    """Ask a worker's endpoint, without any proxy.

    Args:
        address: where it listens; an address that means every interface is asked on loopback.
        path: `/livez` or `/readyz`.
        timeout_s: for the connection and for every part of the answer.

    Returns:
        The verdict, and the checks behind it.

    Raises:
        ConnectionError: nobody listens there, or what listens is no worker.
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
    """Answers `/livez` and `/readyz` from threads of its own, until it is closed.

    Args:
        address: host and port; an empty host for every interface, port 0 for a free one.
        live, ready: give the checks; each must return at once. One that raises is a failing check.

    Attributes:
        address: host and port that it really listens on.

    Raises:
        ConfigurationError: the address is in use, or is none of this host.
    """

    def __init__(self, address: tuple[str, int], live: Probe, ready: Probe) -> None:
        try:
            self._server = _Server(address, {"/livez": live, "/readyz": ready})
        except OSError as exc:
            remedy = "another process listens there; choose another port" if exc.errno == errno.EADDRINUSE else exc
            raise ConfigurationError(
                f"sdtpu_health_address: cannot listen on {format_address(address)}: {remedy}"
            ) from exc
        self.address: tuple[str, int] = self._server.server_address[:2]  # type: ignore[assignment]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="sdtpu-health", daemon=True
        )
        self._thread.start()
        logger.info("health: http://%s/livez and /readyz", format_address(self.address))

    def close(self) -> None:
        """Stop listening and drop the clients that are there; again is harmless."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server.drop_clients(older_than_s=0)


class _Server(ThreadingHTTPServer):
    """A thread per client, for a limited time: the oldest goes when there are too many."""

    daemon_threads = True
    allow_reuse_port = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], paths: dict[str, Probe]) -> None:
        host, port = address
        dual = host in ("", "::") and socket.has_dualstack_ipv6()
        host = "::" if dual else host or "0.0.0.0"
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family, self._dual, self.paths = found[0], dual, paths
        self._clients: dict[socket.socket, float] = {}  # oldest first
        self._lock = threading.Lock()
        super().__init__(found[4][:2], _Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Bind without the look-up in DNS that HTTPServer makes."""
        if self._dual:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a client in a thread."""
        with self._lock:
            if len(self._clients) >= _MAX_CLIENTS:
                oldest = next(iter(self._clients))
                _hang_up(oldest)
                del self._clients[oldest]
            self._clients[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Runs at least every `poll_interval`: end the clients whose time is over, however they trickle."""
        self.drop_clients(_CLIENT_S)

    def drop_clients(self, older_than_s: float) -> None:
        """Hang up on the clients that have been here so long; their threads end by that."""
        with self._lock:
            for request, since in self._clients.items():
                if time.monotonic() - since >= older_than_s:
                    _hang_up(request)

    def close_request(self, request: Any) -> None:
        """Forget a client; under the lock, so that nobody hangs up on a socket that is another's by then."""
        with self._lock:
            self._clients.pop(request, None)
            super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""
        logger.debug("health: client %s", client_address, exc_info=True)


def _hang_up(client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)


class _Lines:
    """A request's lines, up to a number of bytes; after those the stream is at its end."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self._stream, self._left = stream, limit

    def readline(self, size: int) -> bytes:
        line = self._stream.readline(min(size, self._left))
        self._left -= len(line)
        return line

    def close(self) -> None:
        self._stream.close()


class _Handler(BaseHTTPRequestHandler):
    """Answers one request and closes."""

    server: _Server
    server_version, sys_version = "sdtpu_worker", ""
    timeout = _CLIENT_S

    def setup(self) -> None:
        """Bound what is read."""
        super().setup()
        self.rfile = _Lines(self.rfile, _MAX_REQUEST_BYTES)  # type: ignore[assignment, arg-type]

    def do_GET(self) -> None:  # the standard library's name
        """Answer with a verdict and its checks."""
        probe = self.server.paths.get(self.path.partition("?")[0])
        if probe is None:
            self.send_error(404)
            return
        try:
            checks = probe()
        except Exception as exc:
            logger.warning("health: %s failed", self.path, exc_info=True)
            checks = [Check("health", False, f"the check itself failed: {exc!r}")]
        ok = all(check.ok for check in checks)
        found = {check.name: {"ok": check.ok, "detail": check.detail} for check in checks}
        self._answer(200 if ok else 503, {"status": "ok" if ok else "failing", "checks": found})

    do_HEAD = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with an error in JSON; methods other than GET and HEAD are not found either."""
        self._answer(404 if code == 501 else code, {"status": "not found: /livez and /readyz are", "checks": {}})

    def _answer(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode() + b"\n"
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log requests for those who look for them only."""
        logger.debug("health: %s %s", self.client_address[0], format % args)
