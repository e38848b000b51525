"""The door's OpenAPI description, made of one table of operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sdtpu_worker
from sdtpu_worker.http.openapi_shapes import PARAMETERS, SHAPES


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    Attributes:
        method: in lower case.
        path: with `{names}`.
        summary: one line.
        answers: a description, or a media type with the name of a shape, by status.
        takes: the name of the shape of its body; empty for none.
        parameters: names of the shared parameters.
        is_open: whether it needs no key even where the door has keys.
    """

    method: str
    path: str
    summary: str
    answers: Mapping[int, str]
    takes: str = ""
    parameters: Sequence[str] = field(default_factory=tuple)
    is_open: bool = False


_PROBLEMS, _OPENAI = "Problem", "OpenAIError"
OPERATIONS = (
    Operation("post", "/v1/images/generations", "Make pictures and wait for them, in OpenAI's terms",
              {200: "Images"}, "ImagesRequest"),
    Operation("post", "/v1/images/edits", "Change a picture and wait for the result, in OpenAI's terms",
              {200: "Images"}, "EditsForm"),
    Operation("post", "/v1/images/variations", "Not served", {400: _OPENAI}),
    Operation("get", "/v1/models", "The checkpoint that is served", {200: "Object"}),
    Operation("get", "/v1/models/{model}", "The checkpoint that is served", {200: "Object"}, "", ("model",)),
    Operation("post", "/v1/jobs", "Enqueue a job", {200: "Job", 202: "Job"}, "JobRequest", ("key", "prefer")),
    Operation("get", "/v1/jobs", "Your jobs, the newest first", {200: "Jobs"}, "", ("limit", "before", "previews")),
    Operation("get", "/v1/jobs/capabilities", "What is served, and what you may ask for", {200: "Capabilities"}),
    Operation("get", "/v1/jobs/batch", "The slots of all devices, and where jobs of yours wait", {200: "Batch"}, "",
              ("ids",)),
    Operation("get", "/v1/jobs/events", "What becomes of several jobs and of the devices, as server-sent events",
              {200: "events"}, "", ("ids", "last")),
    Operation("get", "/v1/jobs/page", "The page's address without its slash", {308: ""}, is_open=True),
    Operation("get", "/v1/jobs/page/", "The page, for browsers", {200: "html"}, is_open=True),
    Operation("get", "/v1/jobs/page/{name}", "A file of the page", {200: "file", 304: ""}, "", ("name",), is_open=True),
    Operation("get", "/", "To the page", {307: ""}, is_open=True),
    Operation("get", "/v1/jobs/{job_id}", "A job", {200: "Job"}, "", ("job_id",)),
    Operation("delete", "/v1/jobs/{job_id}", "Cancel a job", {200: "Job"}, "", ("job_id",)),
    Operation("get", "/v1/jobs/{job_id}/image", "The picture of a job",
              {200: "image", 206: "image", 304: "", 409: _PROBLEMS, 410: _PROBLEMS, 416: _PROBLEMS}, "",
              ("job_id", "token")),
    Operation("get", "/v1/jobs/{job_id}/events", "What becomes of a job, as server-sent events",
              {200: "events", 204: ""}, "", ("job_id", "last")),
    Operation("post", "/sdapi/v1/txt2img", "Make pictures and wait for them, in the web UI's terms",
              {200: "Object"}, "WebUIRequest"),
    Operation("post", "/sdapi/v1/img2img", "Change a picture and wait for the result, in the web UI's terms",
              {200: "Object"}, "WebUIRequest"),
    Operation("get", "/sdapi/v1/options", "The web UI's settings", {200: "Object"}),
    Operation("post", "/sdapi/v1/options", "Choose the checkpoint that is served", {200: "Anything"}, "Object"),
    Operation("get", "/sdapi/v1/sd-models", "The checkpoint that is served", {200: "Objects"}),
    Operation("get", "/sdapi/v1/samplers", "The samplers", {200: "Objects"}),
    Operation("get", "/sdapi/v1/schedulers", "The spacings of sigmas", {200: "Objects"}),
    Operation("get", "/sdapi/v1/progress", "How far your pictures are", {200: "Object"}),
    Operation("post", "/sdapi/v1/interrupt", "Cancel your pictures", {200: "Object"}),
    Operation("get", "/openapi.json", "This description", {200: "Object"}, is_open=True),
    Operation("get", "/metrics", "What waits in the queues, and the hosts that work on it, for Prometheus",
              {200: "figures"}),
    Operation("get", "/livez", "Whether the door lives", {200: "Object"}, is_open=True),
    Operation("get", "/readyz", "Whether Redis answers", {200: "Object"}, is_open=True),
)  # fmt: skip


_MEDIA = {
    "image": {"image/png": {}, "image/jpeg": {}, "image/webp": {}},
    "events": {"text/event-stream": {}},
    "html": {"text/html": {}},
    "file": {"text/javascript": {}, "text/css": {}, "image/svg+xml": {}},
    "figures": {"text/plain": {}, "application/openmetrics-text": {}},
    "Problem": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
}


def describe(server: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 description of the door.

    Args:
        server: its address.
    """
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _describe_operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "sdtpu_worker", "version": sdtpu_worker.__version__, "license": {"name": "Apache-2.0"}},
        "servers": [{"url": server}],
        "security": [{"key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": SHAPES,
            "parameters": PARAMETERS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _describe_operation(operation: Operation) -> dict[str, Any]:
    is_openai = operation.path.startswith(("/v1/images", "/v1/models"))
    answers = {str(status): _describe_answer(shape) for status, shape in operation.answers.items()}
    answers["default"] = _describe_answer(_OPENAI if is_openai else _PROBLEMS)
    described: dict[str, Any] = {"summary": operation.summary, "responses": answers}
    if operation.parameters:
        described["parameters"] = [{"$ref": f"#/components/parameters/{name}"} for name in operation.parameters]
    if operation.takes:
        schema = {"$ref": f"#/components/schemas/{operation.takes}"}
        media_type = "multipart/form-data" if operation.takes == "EditsForm" else "application/json"
        described["requestBody"] = {"required": True, "content": {media_type: {"schema": schema}}}
    if operation.is_open:
        described["security"] = []
    return described


def _describe_answer(shape: str) -> dict[str, Any]:
    if not shape:
        return {"description": "nothing"}
    content = _MEDIA.get(shape) or {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}
    return {"description": shape, "content": content}
