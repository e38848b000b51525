"""LiteLLM against the door: the library that gateways and agents call models through."""

from __future__ import annotations

import asyncio
import base64
import importlib
import io
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from tests.chaos.pictures import expected_count, shown_count
from tests.http.doors import DoorProcess, start_door

pytestmark = [
    pytest.mark.usefixtures("worker"),
    pytest.mark.filterwarnings("ignore"),  # of the library's own: its types and the connections that it keeps
]

MODEL = "openai/sdtpu"


@pytest.fixture(scope="module")
def litellm() -> ModuleType:
    """Import the library, which takes seconds, where it is used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or the import asks a host for prices
        return importlib.import_module("litellm")


@pytest.fixture
def options(door: DoorProcess) -> dict[str, Any]:
    return {"model": MODEL, "api_base": f"{door.url}/v1", "api_key": "none", "max_retries": 0}


def count_in(answer: Any) -> int:
    return shown_count(base64.b64decode(answer.data[0].b64_json))


def test_a_picture_comes_back(litellm, options):
    answer = litellm.image_generation(
        prompt="a fox", size="auto", n=1, extra_body={"seed": 7, "num_inference_steps": 3}, **options
    )
    assert count_in(answer) == expected_count(7, 3)


def test_pictures_come_back_to_the_asynchronous_client(litellm, options):
    async def ask() -> list[int]:
        calls = [
            litellm.aimage_generation(prompt="a fox", extra_body={"seed": seed, "num_inference_steps": 2}, **options)
            for seed in range(4)
        ]
        try:
            return [count_in(answer) for answer in await asyncio.gather(*calls)]
        finally:
            await litellm.close_litellm_async_clients()

    assert asyncio.run(ask()) == [expected_count(seed, 2) for seed in range(4)]


def test_a_picture_is_edited(litellm, options):
    red = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(red, "PNG")
    answer = litellm.image_edit(
        image=red.getvalue(), prompt="a fox", extra_body={"num_inference_steps": 2, "strength": 1.0}, **options
    )
    assert base64.b64decode(answer.data[0].b64_json).startswith(b"\x89PNG")


def test_a_wrong_parameter_is_a_bad_request_with_the_doors_words(litellm, options):
    with pytest.raises(litellm.BadRequestError, match="num_inference_steps must be"):
        litellm.image_generation(prompt="a fox", extra_body={"num_inference_steps": 0}, **options)


def test_a_full_queue_is_a_rate_limit(redis_url, tmp_path, litellm, options):
    with (
        start_door(redis_url, tmp_path, SDTPU_QUEUE="full-for-litellm", SDTPU_MAX_QUEUE="1") as door,
        door.client() as client,
    ):
        options["api_base"] = f"{door.url}/v1"
        assert client.post("/v1/jobs", json={"prompt": "a fox"}).status_code == 202
        with pytest.raises(litellm.RateLimitError, match="sdtpu_max_queue"):
            litellm.image_generation(prompt="a fox", **options)
