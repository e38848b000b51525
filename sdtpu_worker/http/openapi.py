"""The door's OpenAPI description: one table of operations, and the shapes of what they take and give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sdtpu_worker
from sdtpu_worker.contract.parameter_checks import (
    MAX_GUIDANCE_SCALE,
    MAX_LISTED,
    MAX_LORA_WEIGHT,
    MAX_LORAS,
    MAX_PROMPT_CHARACTERS,
    MAX_SEED,
    MAX_SIDE,
    MAX_TENANT_CHARACTERS,
    MAX_TOLD_SIDE,
    SIDE_MULTIPLE,
)
from sdtpu_worker.contract.prompt_syntax import PROMPT_SYNTAXES
from sdtpu_worker.contract.request import IMAGE_FORMATS, MAX_CLIP_SKIP, MAX_STEPS
from sdtpu_worker.contract.samplers import SAMPLER_NAMES, SIGMA_SPACINGS
from sdtpu_worker.web.parameters import JOB_FIELDS

Shape = dict[str, Any]


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
    Operation("get", "/v1/jobs", "Your jobs, the newest first", {200: "Jobs"}, "", ("limit", "before")),
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


def _text(longest: int, **more: Any) -> Shape:
    return {"type": "string", "maxLength": longest, **more}


def _integer(low: int, high: int, **more: Any) -> Shape:
    return {"type": "integer", "minimum": low, "maximum": high, **more}


def _optional(shape: Shape) -> Shape:
    return {"anyOf": [shape, {"type": "null"}]}


def _one_or_more(shape: Shape) -> Shape:
    return {"anyOf": [shape, {"type": "array", "items": shape, "minItems": 1, "maxItems": MAX_LISTED}]}


_SIDE = _integer(SIDE_MULTIPLE, MAX_SIDE, multipleOf=SIDE_MULTIPLE)
_FRACTION = {"type": "number", "minimum": 0, "maximum": 1}
_PICTURE = {
    "type": "string",
    "description": "a data URI (png, jpeg, webp), or job:ID of a job of yours that has succeeded",
}
_SIZE = "^(auto|[0-9]{1,5}x[0-9]{1,5})$"
_TIME = "^[0-9]{1,12}([.][0-9]{1,9})?$"
_PAIR = {"type": "array", "items": _integer(0, MAX_TOLD_SIDE), "minItems": 2, "maxItems": 2}
_LORA = _text(MAX_TENANT_CHARACTERS, minLength=1)
_LORA_WITH_WEIGHT = {
    "type": "array",
    "prefixItems": [_LORA, {"type": "number", "minimum": -MAX_LORA_WEIGHT, "maximum": MAX_LORA_WEIGHT}],
    "minItems": 2,
    "maxItems": 2,
}
_JOB_FIELDS: dict[str, Shape] = {
    "prompt": _text(MAX_PROMPT_CHARACTERS, minLength=1),
    "negative_prompt": _optional(_text(MAX_PROMPT_CHARACTERS)),
    "seed": {"anyOf": [_integer(0, MAX_SEED), {"type": "string", "pattern": "^[0-9]{1,19}$"}, {"type": "null"}]},
    "num_inference_steps": _optional(_integer(1, MAX_STEPS)),
    "guidance_scale": _optional({"type": "number", "minimum": -MAX_GUIDANCE_SCALE, "maximum": MAX_GUIDANCE_SCALE}),
    "height": _optional(_SIDE),
    "width": _optional(_SIDE),
    "sampler": _optional({"type": "string", "examples": list(SAMPLER_NAMES)}),
    "image_format": {"enum": list(IMAGE_FORMATS)},
    "sigmas": _optional({"enum": list(SIGMA_SPACINGS)}),
    "eta": _optional(_FRACTION),
    "guidance_rescale": _FRACTION,
    "clip_skip": _integer(0, MAX_CLIP_SKIP),
    "prompt_2": _optional(_text(MAX_PROMPT_CHARACTERS)),
    "negative_prompt_2": _optional(_text(MAX_PROMPT_CHARACTERS)),
    "original_size": _optional(_PAIR),
    "target_size": _optional(_PAIR),
    "crops_coords_top_left": _optional(_PAIR),
    "image": _optional(_PICTURE),
    "strength": _optional({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    "mask_image": _optional(_PICTURE),
    "preserve_unmasked": {"type": "boolean"},
    "image_guidance_scale": _optional({"type": "number", "minimum": 0, "maximum": MAX_GUIDANCE_SCALE}),
    "control_image": _optional(_one_or_more(_PICTURE)),
    "controlnet": _optional(_one_or_more(_text(MAX_TENANT_CHARACTERS, minLength=1))),
    "controlnet_conditioning_scale": _one_or_more({"type": "number", "minimum": 0, "maximum": MAX_GUIDANCE_SCALE}),
    "control_guidance_start": _one_or_more(_FRACTION),
    "control_guidance_end": _one_or_more(_FRACTION),
    "loras": _optional({"type": "array", "items": {"anyOf": [_LORA, _LORA_WITH_WEIGHT]}, "maxItems": MAX_LORAS}),
    "prompt_syntax": {"enum": list(PROMPT_SYNTAXES)},
    "tenant": _optional(_text(MAX_TENANT_CHARACTERS, minLength=1)),
    "priority": _optional(_integer(0, 9)),
    "expires": _optional({"type": "number", "exclusiveMinimum": 0, "maximum": 1e9}),
}
_SHAPES: dict[str, Shape] = {
    "Anything": {},
    "Object": {"type": "object"},
    "Objects": {"type": "array", "items": {"type": "object"}},
    "JobRequest": {
        "type": "object",
        "properties": {
            **{name: _JOB_FIELDS[name] for name in JOB_FIELDS},
            "webhook": {"type": "string", "format": "uri"},
        },
        "required": ["prompt"],
        "additionalProperties": False,
    },
    "Job": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "format": "uuid"},
            "status": {"enum": ["queued", "running", "succeeded", "failed", "cancelled"]},
            "created_at": {"type": "number", "description": "seconds since 1970"},
            "parameters": {"type": "object"},
            "progress": _optional({"type": "object"}),
            "result": _optional({"type": "object"}),
            "error": _optional({"type": "object"}),
            "links": {"type": "object"},
        },
        "required": ["id", "status", "created_at", "parameters", "links"],
    },
    "Jobs": {
        "type": "object",
        "properties": {
            "jobs": {"type": "array", "items": {"$ref": "#/components/schemas/Job"}},
            "next": _optional({"type": "string"}),
        },
        "required": ["jobs", "next"],
    },
    "ImagesRequest": {
        "type": "object",
        "properties": {
            **{name: shape for name, shape in _JOB_FIELDS.items() if name not in ("image_format", "tenant")},
            "n": _optional(_integer(1, 10)),
            "size": _optional({"type": "string", "pattern": _SIZE}),
            "response_format": _optional({"enum": ["b64_json", "url"]}),
            "output_format": _optional({"enum": list(IMAGE_FORMATS)}),
            "output_compression": _optional(_integer(0, 100)),
            "stream": _optional({"type": "boolean"}),
            "partial_images": _optional(_integer(0, 3)),
            "user": _optional({"type": "string"}),
        },
        "required": ["prompt"],
    },
    "EditsForm": {
        "type": "object",
        "properties": {
            "image": {"type": "string", "format": "binary"},
            "mask": {"type": "string", "format": "binary"},
            "prompt": _JOB_FIELDS["prompt"],
            "n": _integer(1, 10),
            "size": {"type": "string", "pattern": _SIZE},
        },
        "required": ["image", "prompt"],
    },
    "Images": {
        "type": "object",
        "properties": {"created": {"type": "integer"}, "data": {"type": "array", "items": {"type": "object"}}},
        "required": ["created", "data"],
    },
    "WebUIRequest": {"type": "object", "properties": {"prompt": _JOB_FIELDS["prompt"]}, "required": ["prompt"]},
    "Problem": {
        "type": "object",
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "code": {"type": "string"},
            "detail": {"type": "string"},
        },
        "required": ["type", "title", "status", "code", "detail"],
    },
    "OpenAIError": {
        "type": "object",
        "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"]}},
        "required": ["error"],
    },
}
_PARAMETERS: dict[str, Shape] = {
    "job_id": {"in": "path", "name": "job_id", "required": True, "schema": {"type": "string", "format": "uuid"}},
    "model": {"in": "path", "name": "model", "required": True, "schema": {"type": "string"}},
    "token": {"in": "query", "name": "token", "schema": {"type": "string"}},
    "limit": {"in": "query", "name": "limit", "schema": _integer(1, 200)},
    "before": {"in": "query", "name": "before", "schema": {"type": "string", "pattern": _TIME}},
    "key": {"in": "header", "name": "Idempotency-Key", "schema": _text(255, minLength=1)},
    "prefer": {"in": "header", "name": "Prefer", "schema": {"type": "string", "examples": ["wait=20"]}},
    "last": {"in": "header", "name": "Last-Event-ID", "schema": {"type": "string"}},
}
_MEDIA = {
    "image": {"image/png": {}, "image/jpeg": {}, "image/webp": {}},
    "events": {"text/event-stream": {}},
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
            "schemas": _SHAPES,
            "parameters": _PARAMETERS,
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
