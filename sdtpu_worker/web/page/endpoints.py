"""The page's document and its files. They are the same for everybody, so they need no key; what they ask for does."""

from __future__ import annotations

import functools
import hashlib
import html
from importlib import resources
from typing import TYPE_CHECKING

from sdtpu_worker.web.exchange import Answer, WebRequest
from sdtpu_worker.web.image_answer import names_tag
from sdtpu_worker.web.problems import Refusal

if TYPE_CHECKING:
    from sdtpu_worker.web.service import JobsService

_TYPES = {
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
    "html": "text/html; charset=utf-8",
}
_DOCUMENT, _TOKEN = "index.html", "CSRF-TOKEN"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""Of the page and all of its files: nothing is loaded from elsewhere, and no script or style stands in the page."""


@functools.cache
def read_files() -> dict[str, bytes]:
    """Return the page's files by name."""
    folder = resources.files("sdtpu_worker.web.page") / "files"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.rpartition(".")[2] in _TYPES}


async def to_page(service: JobsService, request: WebRequest) -> Answer:
    """Answer `GET /v1/jobs/page`: the page's names are relative to an address that ends in a slash."""
    _check_is_on(service)
    return Answer(308, {"Location": "page/"})


async def show_page(service: JobsService, request: WebRequest) -> Answer:
    """Answer `GET /v1/jobs/page/`."""
    _check_is_on(service)
    token = html.escape(await service.jobs.threads.call(request.csrf_token), quote=True).encode()
    body = read_files()[_DOCUMENT].replace(_TOKEN.encode(), token)
    return Answer(200, {**HEADERS, "Cache-Control": "no-store"}, body, _TYPES["html"])


async def send_file(service: JobsService, request: WebRequest, name: str) -> Answer:
    """Answer `GET /v1/jobs/page/{name}`."""
    if name == _DOCUMENT or (data := read_files().get(name)) is None:
        raise Refusal(404, "NoSuchFile", f"the page has no file {name!r:.60}")
    etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": etag, "Cache-Control": "no-cache"}
    if names_tag(request.headers.get("if-none-match", ""), etag):
        return Answer(304, headers)
    return Answer(200, headers, data, _TYPES[name.rpartition(".")[2]])


def _check_is_on(service: JobsService) -> None:
    if not service.has_page:
        raise Refusal(404, "NoPage", "this front does not show the page (sdtpu_http_page, sdtpu_web_page)")
