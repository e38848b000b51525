"""The shapes in the door's OpenAPI description: of bodies by name, and of what stands in paths, queries and headers."""

from __future__ import annotations

from typing import Any

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
from sdtpu_worker.contract.served import PICTURE_USES
from sdtpu_worker.web.parameters import JOB_FIELDS

Shape = dict[str, Any]


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
_UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_IDS = f"^({_UUID}(,{_UUID}){{0,49}})?$"
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
SHAPES: dict[str, Shape] = {
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
            "wait": _optional(
                {"type": "object", "description": "in the queue: how many jobs are `ahead`, `eta_s` to the picture"}
            ),
            "progress": _optional({"type": "object"}),
            "preview": _optional(
                {
                    "type": "object",
                    "description": "the forming picture, `format` and `b64_json`; of a list with `previews`",
                }
            ),
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
    "Capabilities": {
        "type": "object",
        "properties": {
            "workers": _optional({"type": "integer", "description": "null while that is not known"}),
            "model": _optional({"type": "string"}),
            "sizes": {"type": "array", "items": {"type": "object", "required": ["height", "width"]}},
            "samplers": {"type": "array", "items": {"type": "string"}},
            "steps": {"type": "object"},
            "guidance": {"type": "object"},
            "negative_prompt": {"type": "boolean"},
            "loras": {"type": "object"},
            "controlnets": {"type": "array", "items": {"type": "string"}},
            "pictures": {"enum": list(PICTURE_USES)},
            "previews": {"type": "boolean"},
        },
        "required": ["workers", "model", "sizes", "samplers", "steps", "guidance", "loras", "controlnets", "pictures"],
    },
    "Batch": {
        "type": "object",
        "properties": {
            "known": {"type": "boolean", "description": "false while the queue cannot be read"},
            "hosts": {"type": "array", "items": {"type": "object", "required": ["name", "slots", "busy", "devices"]}},
            "slots": {"type": "integer"},
            "busy": {"type": "integer"},
            "waiting": {"type": "integer", "description": "jobs that wait in the queues, whoever's they are"},
            "waits": {"type": "object", "description": "`ahead` and `eta_s` of those of `ids` that wait, by id"},
        },
        "required": ["known", "hosts", "slots", "busy", "waiting", "waits"],
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
PARAMETERS: dict[str, Shape] = {
    "job_id": {"in": "path", "name": "job_id", "required": True, "schema": {"type": "string", "format": "uuid"}},
    "model": {"in": "path", "name": "model", "required": True, "schema": {"type": "string"}},
    "token": {"in": "query", "name": "token", "schema": {"type": "string"}},
    "name": {"in": "path", "name": "name", "required": True, "schema": {"type": "string"}},
    "ids": {"in": "query", "name": "ids", "schema": {"type": "string", "pattern": _IDS}},
    "limit": {"in": "query", "name": "limit", "schema": _integer(1, 200)},
    "previews": {"in": "query", "name": "previews", "schema": {"type": "boolean"}},
    "before": {"in": "query", "name": "before", "schema": {"type": "string", "pattern": _TIME}},
    "key": {"in": "header", "name": "Idempotency-Key", "schema": _text(255, minLength=1)},
    "prefer": {"in": "header", "name": "Prefer", "schema": {"type": "string", "examples": ["wait=20"]}},
    "last": {"in": "header", "name": "Last-Event-ID", "schema": {"type": "string"}},
}
