"""Enqueue a prompt, tell its state, send the image."""

import functools
import json
from collections.abc import Callable
from typing import Any

from celery import current_app, states
from celery.result import AsyncResult
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import reverse
from django.views.decorators.http import require_GET, require_POST
from redis.exceptions import RedisError

from sdtpu_worker import (
    BrokerUnavailable,
    InvalidRequest,
    StorageError,
    generate,
    image_content_type,
    read_image_bytes,
)

NUMBERS = {"seed": int, "num_inference_steps": int, "height": int, "width": int, "guidance_scale": float}
STATUS_OF: dict[type[Exception], int] = {
    InvalidRequest: 400,
    StorageError: 404,
    BrokerUnavailable: 503,
    RedisError: 503,
}


def errors_as_json(view: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
    """Answer an expected error with its status and its text."""

    @functools.wraps(view)
    def wrapped(*args: Any, **kwargs: Any) -> HttpResponse:
        try:
            return view(*args, **kwargs)
        except tuple(STATUS_OF) as exc:
            status = next(status for error, status in STATUS_OF.items() if isinstance(exc, error))
            return JsonResponse({"error": str(exc)}, status=status)

    return wrapped


@require_POST
@errors_as_json
def create_image(request: HttpRequest) -> HttpResponse:
    job = generate.apply_async(kwargs=read_parameters(request))
    return JsonResponse({"task_id": job.id, "status_url": reverse("image_status", args=[job.id])}, status=202)


@require_GET
@errors_as_json
def image_status(request: HttpRequest, task_id: str) -> HttpResponse:
    job = current_app.backend.get_task_meta(task_id)  # state and result of one moment
    status = {"task_id": task_id, "state": job["status"], "status_url": reverse("image_status", args=[task_id])}
    if job["status"] == states.SUCCESS:
        status |= {"image_url": reverse("image", args=[task_id]), "result": job["result"]}
    elif job["status"] == "PROGRESS":
        status["progress"] = job["result"]
    elif job["status"] in states.EXCEPTION_STATES:
        status["error"] = str(job["result"])
    return JsonResponse(status)


@require_GET
@errors_as_json
def image(request: HttpRequest, task_id: str) -> HttpResponse:
    job = AsyncResult(task_id)
    if job.state != states.SUCCESS:
        return JsonResponse({"error": f"no image yet: the job is {job.state}"}, status=404)
    data, content_type = read_image_bytes(job.result), image_content_type(job.result)
    return HttpResponse(data, content_type=content_type, headers={"X-Content-Type-Options": "nosniff"})


def read_parameters(request: HttpRequest) -> dict[str, Any]:
    """Return the JSON object, or the form with its numbers as numbers and its empty fields left out.

    What does not look like a number stays text: the package refuses it by name.
    """
    if request.content_type != "application/json":
        return {name: as_number(name, text) for name, text in request.POST.items() if text}
    try:
        parameters = json.loads(request.body)
    except ValueError:
        parameters = None
    if not isinstance(parameters, dict):
        raise InvalidRequest('the body must be a JSON object like {"prompt": "a red circle"}')
    return parameters


def as_number(name: str, text: str) -> int | float | str:
    try:
        return NUMBERS[name](text) if name in NUMBERS else text
    except ValueError:
        return text
