"""The views: the jobs API for WSGI and for ASGI. Under ASGI a stream of events holds no thread."""

from __future__ import annotations

from collections.abc import Callable

from django.apps import apps
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.middleware.csrf import get_token
from django.urls import reverse

from sdtpu_worker.contrib.django.owners import find_owner
from sdtpu_worker.web.exchange import EventAnswer
from sdtpu_worker.web.sync_front import SyncFront, SyncRequest


def serve(path: str) -> Callable[..., HttpResponseBase]:
    """Return the view of a path of the jobs API. Django's own rules hold for it, such as those of CSRF."""

    def view(request: HttpRequest, **names: str) -> HttpResponseBase:
        front: SyncFront = apps.get_app_config("sdtpu").front
        is_asgi = isinstance(request, ASGIRequest)
        asked = SyncRequest(
            method=request.method or "",
            base=request.build_absolute_uri(reverse(f"{request.resolver_match.namespace}:jobs")),
            headers={name.lower(): value for name, value in request.headers.items()},
            query=request.GET.dict(),
            owner=lambda: find_owner(request),
            read=request.read,
            holds_thread=not is_asgi,
            csrf_token=lambda: get_token(request),
        )
        answer = front.answer(path, asked, **names)
        if isinstance(answer, EventAnswer):
            events = front.iterate_async(answer) if is_asgi else front.iterate(answer)
            return StreamingHttpResponse(events, content_type=answer.media_type, headers=dict(answer.headers))
        response = HttpResponse(answer.body, status=answer.status, headers=dict(answer.headers))
        if answer.media_type:
            response["Content-Type"] = answer.media_type
        else:
            del response["Content-Type"]
        return response

    return view
