"""The API of A1111's web UI, `/sdapi/v1`, as far as Open WebUI and SillyTavern use it."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sdtpu_worker.contract.samplers import DIFFUSERS_CLASSES, OTHER_NAMES, SIGMA_SPACINGS
from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.http.bodies import read_json
from sdtpu_worker.http.door import Door, door_of
from sdtpu_worker.http.openai_images import wait_for_pictures
from sdtpu_worker.http.pictures_in import fit_mask, fit_picture, read_base64
from sdtpu_worker.web.bodies import check_fields
from sdtpu_worker.web.caller import Caller
from sdtpu_worker.web.job_records import JobRecord
from sdtpu_worker.web.job_state import JobState
from sdtpu_worker.web.parameters import with_seed

KIND = "sdapi"
MOST_PICTURES = 16
_RENAMED = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "sampler_name": "sampler",
    "sampler_index": "sampler",
    "eta": "eta",
}
"""The web UI's names of parameters, and ours."""
_AUTOMATIC = ("", "automatic", "use same scheduler", "uniform", "normal", "simple")
_WITHOUT_EFFECT = (
    "styles", "subseed", "subseed_strength", "seed_resize_from_h", "seed_resize_from_w", "restore_faces", "tiling",
    "do_not_save_samples", "do_not_save_grid", "save_images", "send_images", "denoising_strength", "s_min_uncond",
    "s_churn", "s_tmax", "s_tmin", "s_noise", "override_settings_restore_afterwards", "refiner_checkpoint",
    "refiner_switch_at", "disable_extra_networks", "firstpass_image", "comments", "firstphase_width",
    "firstphase_height", "hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y",
    "hr_checkpoint_name", "hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt", "hr_cfg",
    "hr_distilled_cfg", "hr_additional_modules", "force_task_id", "script_name", "script_args", "alwayson_scripts",
    "infotext", "distilled_cfg_scale", "enable_hr",
)  # fmt: skip
"""Fields that clients send along, and that change nothing here."""
_OWN = ("scheduler", "clip_skip", "batch_size", "n_iter", "override_settings")
_FIELDS = (*_RENAMED, *_OWN, *_WITHOUT_EFFECT)
_IMG2IMG = (
    "init_images", "mask", "inpainting_mask_invert", "resize_mode", "mask_blur", "mask_blur_x", "mask_blur_y",
    "mask_round", "inpainting_fill", "inpaint_full_res", "inpaint_full_res_padding", "initial_noise_multiplier",
    "latent_mask", "image_cfg_scale", "include_init_images", "denoising_strength",
)  # fmt: skip
"""Further fields of `img2img`."""
_CANNOT = ("enable_hr", "tiling", "restore_faces", "script_name")
"""Fields whose effect somebody would miss; refused where they are switched on."""


def read_request(body: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the parameters of `generate` that a request of the web UI's clients means, and how many pictures.

    Raises:
        InvalidRequest: a field is unknown, not allowed, or asks for what is not served.
    """
    check_fields(dict(body), _FIELDS)
    given = {name: value for name, value in body.items() if value is not None}
    for name in _CANNOT:
        if given.get(name):
            raise InvalidRequest(f"{name} must be off, got {given[name]!r:.40}: this deployment cannot do it")
    parameters = {ours: given[name] for name, ours in _RENAMED.items() if name in given}
    parameters["prompt_syntax"] = "weighted"  # as everybody writes who has the web UI's API in mind
    if parameters.get("seed") == -1:
        del parameters["seed"]
    if not parameters.get("sampler") or str(parameters["sampler"]).casefold() == "automatic":
        parameters.pop("sampler", None)
    scheduler = str(given.get("scheduler", "")).casefold()
    if scheduler in SIGMA_SPACINGS:
        parameters["sigmas"] = scheduler
    elif scheduler not in _AUTOMATIC:
        allowed = ", ".join(("automatic", *SIGMA_SPACINGS))
        raise InvalidRequest(f"scheduler must be one of {allowed}, got {given['scheduler']!r:.40}")
    settings = given.get("override_settings", {})
    clip_skip = given.get("clip_skip", settings.get("CLIP_stop_at_last_layers") if isinstance(settings, dict) else None)
    if isinstance(clip_skip, int) and clip_skip > 1:  # the web UI counts the last layer as 1
        parameters["clip_skip"] = clip_skip - 1
    counts = [given.get(name, 1) for name in ("batch_size", "n_iter")]
    if any(not isinstance(count, int) or isinstance(count, bool) or count < 1 for count in counts):
        raise InvalidRequest(f"batch_size and n_iter must be integers from 1, got {counts!r:.60}")
    if (n := counts[0] * counts[1]) > MOST_PICTURES:
        raise InvalidRequest(f"batch_size times n_iter must be at most {MOST_PICTURES}, got {n:,}")
    return parameters, n


async def txt2img(request: Request) -> Response:
    """Answer `POST /sdapi/v1/txt2img`."""
    door = door_of(request)
    caller = door.callers.find(request)
    body = await read_json(request, door.max_body_bytes)
    parameters, n = read_request(body)
    return await _answer(door, request, caller, body, parameters, n)


async def img2img(request: Request) -> Response:
    """Answer `POST /sdapi/v1/img2img`."""
    door = door_of(request)
    caller = door.callers.find(request)
    body = await read_json(request, door.max_body_bytes)
    given = {name: value for name, value in body.items() if value is not None}
    images = given.get("init_images")
    if not isinstance(images, list) or len(images) != 1:
        raise InvalidRequest("init_images must be a list of one picture in base64")
    parameters, n = read_request({name: value for name, value in given.items() if name not in _IMG2IMG})
    pictures = await door.jobs.threads.call(_pictures, given, parameters)
    return await _answer(door, request, caller, _without_pictures(body), {**parameters, **pictures}, n)


def _pictures(given: Mapping[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the pictures of a request as parameters; their size is the result's, so none is asked for besides."""
    width, height = parameters.pop("width", None), parameters.pop("height", None)
    has_size = all(type(side) is int for side in (width, height))
    size = (width, height) if has_size else None
    pictures: dict[str, Any] = {
        "image": fit_picture("init_images", read_base64("init_images", given["init_images"][0]), size)
    }
    if given.get("mask"):
        is_inverted = bool(given.get("inpainting_mask_invert"))
        pictures["mask_image"] = fit_mask("mask", read_base64("mask", given["mask"]), size, is_inverted)
    if "denoising_strength" in given:
        pictures["strength"] = given["denoising_strength"]
    return pictures


def _without_pictures(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in ("init_images", "mask")}


async def _answer(
    door: Door, request: Request, caller: Caller, body: Mapping[str, Any], parameters: Mapping[str, Any], n: int
) -> Response:
    given = [with_seed(parameters, number) for number in range(n)]
    records = await door.jobs.make_records(caller, given, KIND)
    await door.jobs.submit(caller, records)
    states = await wait_for_pictures(door, request, records)
    images = [base64.b64encode(await door.jobs.read_image(state)).decode() for state in states]
    return JSONResponse({"images": images, "parameters": body, "info": json.dumps(_info(door, states))})


async def show_options(request: Request) -> Response:
    """Answer `GET /sdapi/v1/options`."""
    door = door_of(request)
    door.callers.find(request)
    return JSONResponse({"sd_model_checkpoint": door.model, "sd_vae": "Automatic", "CLIP_stop_at_last_layers": 1})


async def set_options(request: Request) -> Response:
    """Answer `POST /sdapi/v1/options`: the model that is served may be chosen, and no other."""
    door = door_of(request)
    door.callers.find(request)
    given = await read_json(request, door.max_body_bytes)
    wanted = given.get("sd_model_checkpoint", door.model)
    if wanted != door.model:
        raise InvalidRequest(
            f"sd_model_checkpoint must be {door.model!r}, which this deployment serves, got {wanted!r:.60}"
        )
    return JSONResponse(None)


async def list_models(request: Request) -> Response:
    """Answer `GET /sdapi/v1/sd-models`."""
    door = door_of(request)
    door.callers.find(request)
    facts = {"title": door.model, "model_name": door.model, "hash": None, "sha256": None, "filename": door.model,
             "config": None}  # fmt: skip
    return JSONResponse([facts])


async def list_samplers(request: Request) -> Response:
    """Answer `GET /sdapi/v1/samplers`."""
    door_of(request).callers.find(request)
    names = [(OTHER_NAMES.get(sampler, (sampler,))[0], sampler) for sampler in DIFFUSERS_CLASSES]
    return JSONResponse([{"name": name, "aliases": [sampler], "options": {}} for name, sampler in names])


async def list_schedulers(request: Request) -> Response:
    """Answer `GET /sdapi/v1/schedulers`."""
    door_of(request).callers.find(request)
    names = ("automatic", *SIGMA_SPACINGS)
    return JSONResponse([{"name": name, "label": name.capitalize(), "aliases": None} for name in names])


async def show_progress(request: Request) -> Response:
    """Answer `GET /sdapi/v1/progress`: of the caller's jobs that came by this API."""
    door = door_of(request)
    states = [state for _, state in await _open_jobs(door, request)]
    total, current, eta_s, preview = len(states), 0.0, 0.0, None
    for state in states:
        progress = state.progress or {}
        current += (progress.get("current") or 0) / (progress.get("total") or 1)
        eta_s = max(eta_s, progress.get("eta_s") or 0.0)
        preview = state.preview or preview
    job = {"skipped": False, "interrupted": False, "job": "txt2img" if total else "", "job_count": total, "job_no": 0,
           "job_timestamp": time.strftime("%Y%m%d%H%M%S"), "sampling_step": 0, "sampling_steps": 0}  # fmt: skip
    if states and (first := states[0].progress):
        job |= {"sampling_step": first["current"], "sampling_steps": first["total"]}
    return JSONResponse(
        {
            "progress": round(current / total, 4) if total else 0.0,
            "eta_relative": eta_s,
            "state": job,
            "current_image": preview,
            "textinfo": None,
        }
    )


async def interrupt(request: Request) -> Response:
    """Answer `POST /sdapi/v1/interrupt`: the caller's own jobs of this API are cancelled, nobody else's."""
    door = door_of(request)
    door.jobs.cancel_later([record for record, _ in await _open_jobs(door, request)])
    return JSONResponse({})


async def _open_jobs(door: Door, request: Request) -> list[tuple[JobRecord, JobState]]:
    caller = door.callers.find(request)
    records = await door.jobs.records.list_open(caller.name, KIND)
    states = await door.jobs.read_states([record.id for record in records])
    return [(record, state) for record, state in zip(records, states, strict=True) if not state.has_ended]


def _info(door: Door, states: list[JobState]) -> dict[str, Any]:
    results = [state.result for state in states if state.result is not None]
    first = results[0]
    return {
        "prompt": first["prompt"],
        "negative_prompt": first["negative_prompt"],
        "seed": first["seed"],
        "all_seeds": [result["seed"] for result in results],
        "all_prompts": [result["prompt"] for result in results],
        "steps": first["num_inference_steps"],
        "cfg_scale": first["guidance_scale"],
        "sampler_name": first["sampler"],
        "width": first["image"]["width"],
        "height": first["image"]["height"],
        "sd_model_name": door.model,
        "batch_size": len(results),
    }
