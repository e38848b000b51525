"""A stand-in for device workers in the tests of a web app: jobs run in the test's own process and draw at once.

It works with `task_always_eager` and with the workers of `celery.contrib.pytest` and `celery.contrib.testing`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from celery import Task

from sdtpu_worker.client.task import GenerateTask
from sdtpu_worker.config import read_setting
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.contract.result import BatchPlace, GenerationResult, StoredImage, Timings, describe_loras
from sdtpu_worker.contract.samplers import SAMPLER_NAMES
from sdtpu_worker.images.store import FileImageStore, make_image_store

MODEL = "stand-in"
"""What a stand-in's result has as `model`."""
_SIDE, _SQUARES = 64, 8
_STORE = "SDTPU_IMAGE_STORE"


@contextlib.contextmanager
def stand_in(
    image_store: str | None = "memory://sdtpu-stand-in",
    body: Callable[[Task, Sequence[Any], Mapping[str, Any]], dict[str, Any]] | None = None,
) -> Iterator[None]:
    """Have every `sdtpu.generate` of this process draw a small picture instead of needing a device, for the block.

    The parameters are checked as a worker checks them. The picture shows 8 x 8 coloured squares, which are the same
    for the same parameters; it is 64 x 64 pixels where the job asks for no size. Jobs without a queue of their own go
    to the app's `task_default_queue`, which the worker of a test consumes.

    Args:
        image_store: where the pictures go and are read from, as for `sdtpu_image_store`; None for the app's own store.
        body: what does a job, in place of `draw`.
    """
    store_before = os.environ.get(_STORE)
    if image_store is not None:
        os.environ[_STORE] = image_store
    before, GenerateTask.stand_in = GenerateTask.stand_in, staticmethod(body or draw)
    try:
        yield
    finally:
        GenerateTask.stand_in = before
        if image_store is not None:
            os.environ.pop(_STORE)
            if store_before is not None:
                os.environ[_STORE] = store_before


def draw(task: Task, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Do what a device worker does for a job, without a device; see `sdtpu_worker.worker.run_job`."""
    task_id = task.request.id
    request = GenerationRequest.parse(args, kwargs).with_seed(task_id).with_defaults(SAMPLER_NAMES[0])
    width, height = request.width or _SIDE, request.height or _SIDE
    data = _picture(request, width, height)
    url = read_setting("sdtpu_image_store", task.app.conf)
    store = FileImageStore(url) if url.startswith("memory:") else make_image_store(task.app, url)
    uri = store.put(task_id, request.image_format, data)
    assert request.seed is not None
    return GenerationResult(
        task_id=task_id,
        image=StoredImage(uri, request.image_format, width, height, len(data)),
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        **request.parameters(),
        model=MODEL,
        prompt_truncated=False,
        nsfw_content_detected=None,
        timings=Timings(queued_s=0.0, device_s=0.0, total_s=0.0),
        batch=BatchPlace(device=0, slot=0, occupied=1, num_slots=1),
        options=request.options(),
        loras=describe_loras(request.loras),
    ).to_json()


def _picture(request: GenerationRequest, width: int, height: int) -> bytes:
    from PIL import Image

    what = json.dumps({**request.to_json(), "image_format": None}, sort_keys=True)
    colours = hashlib.shake_256(what.encode()).digest(3 * _SQUARES**2)
    image = Image.frombytes("RGB", (_SQUARES, _SQUARES), colours).resize((width, height), Image.Resampling.NEAREST)
    data = io.BytesIO()
    image.save(data, request.image_format)
    return data.getvalue()
