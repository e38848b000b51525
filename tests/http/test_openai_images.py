"""OpenAI's own client, and curl, against the door."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import subprocess
from collections.abc import Iterator

import httpx
import pytest
from openai import APIError, APIStatusError, AsyncOpenAI, BadRequestError, OpenAI, RateLimitError
from PIL import Image

from tests.chaos.pictures import expected_count, shown_count
from tests.http.doors import DoorProcess, start_door
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("worker")


@pytest.fixture
def openai(door: DoorProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def last_job(client: httpx.Client, prompt: str) -> dict:
    """Return the caller's newest job with this prompt, once there is one."""

    def find():
        jobs = client.get("/v1/jobs").json()["jobs"]
        return next((job for job in jobs if job["parameters"]["prompt"] == prompt), None)

    return wait_until(find, f"a job for {prompt!r}")


def test_a_picture_comes_back_in_base64(openai):
    answer = openai.images.generate(prompt="a fox", extra_body={"seed": 7, "num_inference_steps": 3})
    assert shown_count(base64.b64decode(answer.data[0].b64_json)) == expected_count(7, 3)
    assert answer.size == "8x8"


def test_what_other_models_need_is_ignored(openai):
    answer = openai.images.generate(
        prompt="a fox", model="gpt-image-1", quality="high", style="vivid", background="opaque", moderation="low",
        size="auto", user="ann", extra_body={"num_inference_steps": 1, "whatever": {"a": [1]}},
    )  # fmt: skip
    assert answer.data[0].b64_json


def test_several_pictures_have_seeds_one_after_the_other(openai):
    answer = openai.images.generate(prompt="a fox", n=3, extra_body={"seed": 7, "num_inference_steps": 2})
    counts = [shown_count(base64.b64decode(picture.b64_json)) for picture in answer.data]
    assert counts == [expected_count(seed, 2) for seed in (7, 8, 9)]


def test_an_address_is_good_without_a_key(openai):
    answer = openai.images.generate(prompt="a fox", response_format="url", extra_body={"num_inference_steps": 1})
    url = answer.data[0].url
    assert httpx.get(url, timeout=30, trust_env=False).content.startswith(b"\x89PNG")
    assert httpx.get(url[:-1], timeout=30, trust_env=False).status_code == 404


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_the_format_is_the_one_that_was_asked_for(openai, image_format):
    small, large = (
        base64.b64decode(
            openai.images.generate(
                prompt="a fox", output_format=image_format, output_compression=quality,
                extra_body={"num_inference_steps": 1, "seed": 5},
            ).data[0].b64_json
        )
        for quality in (5, 100)
    )  # fmt: skip
    assert Image.open(io.BytesIO(large)).format == image_format.upper()
    assert (len(small) < len(large)) == (image_format != "png")


def test_the_asynchronous_client_gets_its_pictures(door):
    async def ask() -> list[int]:
        async with AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.images.generate(prompt="a fox", extra_body={"seed": seed, "num_inference_steps": 2})
                  for seed in range(8))
            )  # fmt: skip
        return [shown_count(base64.b64decode(answer.data[0].b64_json)) for answer in answers]

    assert asyncio.run(ask()) == [expected_count(seed, 2) for seed in range(8)]


def test_a_stream_has_previews_and_then_the_picture(openai):
    stream = openai.images.generate(
        prompt="a fox", stream=True, partial_images=3, extra_body={"seed": 7, "num_inference_steps": 300}
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    counts = [shown_count(base64.b64decode(event.b64_json)) for event in events]
    assert counts == sorted(set(counts))
    assert counts[-1] == expected_count(7, 300)
    assert [event.partial_image_index for event in events[:-1]] == [0, 1, 2]


def test_a_stream_without_previews_has_the_picture_alone(openai):
    stream = openai.images.generate(prompt="a fox", stream=True, extra_body={"num_inference_steps": 30})
    assert [event.type for event in stream] == ["image_generation.completed"]


def test_a_failure_ends_a_stream_with_an_error(openai):
    stream = openai.images.generate(prompt="nan", stream=True)
    with pytest.raises(APIError, match="finite") as caught:
        list(stream)
    assert caught.value.code == "GenerationFailed"


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"prompt": " "}, "prompt"),
        ({"prompt": "a fox", "n": 11}, "n"),
        ({"prompt": "a fox", "size": "large"}, "size"),
        ({"prompt": "a fox", "size": "8x12"}, "height"),
        ({"prompt": "a fox", "response_format": "tape"}, "response_format"),
        ({"prompt": "a fox", "extra_body": {"seed": -1}}, "seed"),
        ({"prompt": "a fox", "extra_body": {"priority": 10}}, "priority"),
        ({"prompt": "a fox", "extra_body": {"expires": 0}}, "expires"),
        ({"prompt": "a fox", "stream": True, "n": 2}, "n"),
    ],
)
def test_a_wrong_parameter_is_named(openai, wrong, param):
    with pytest.raises(BadRequestError, match=param) as caught:
        openai.images.generate(**wrong)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("PUT", "/v1/images/generations", 405, "PUT is not allowed here; allowed: POST"),
        ("POST", "/v1/chat/completions", 404, "there is nothing at '/v1/chat/completions'"),
    ],
)
def test_what_is_not_there_is_said_in_openais_form(client, method, path, status, words):
    answer = client.request(method, path)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_the_model_is_listed(openai):
    assert [model.id for model in openai.models.list()] == ["embedded"]
    assert openai.models.retrieve("embedded").owned_by == "sdtpu_worker"
    with pytest.raises(APIStatusError, match="embedded"):
        openai.models.retrieve("gpt-image-1")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_takes_its_job_with_it(door, client, stream):
    prompt = f"nobody waits for it, {stream}"
    body = {"prompt": prompt, "num_inference_steps": 1000, "stream": stream}
    with door.client() as leaving:
        leaving.timeout = httpx.Timeout(30, read=4)  # seconds without an answer, or without an event
        with pytest.raises(httpx.ReadTimeout):
            leaving.post("/v1/images/generations", json=body)
    job = last_job(client, prompt)
    wait_until(lambda: client.get(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled", "the job to be cancelled")


def test_a_full_queue_is_refused_with_the_time_to_wait(redis_url, tmp_path):
    with start_door(redis_url, tmp_path, SDTPU_QUEUE="full", SDTPU_MAX_QUEUE="1") as door:
        with door.client() as client:
            assert client.post("/v1/jobs", json={"prompt": "a fox"}).status_code == 202
        openai = OpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(RateLimitError, match="sdtpu_max_queue") as caught:
            openai.images.generate(prompt="a fox")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "QueueFull"


def test_of_several_pictures_none_is_enqueued_when_one_is_refused(redis_url, tmp_path):
    with (
        start_door(redis_url, tmp_path, SDTPU_QUEUE="nearly-full", SDTPU_MAX_QUEUE="2") as door,
        door.client() as client,
    ):
        refused = client.post("/v1/images/generations", json={"prompt": "one of three", "n": 3})
        assert refused.status_code == 429
        wait_until(lambda: "one of three" not in client.get("/v1/jobs").text, "the records to be withdrawn")


def test_a_picture_that_takes_too_long_is_cancelled(redis_url, tmp_path):
    with start_door(redis_url, tmp_path, SDTPU_QUEUE="nobody", SDTPU_HTTP_WAIT_S="1") as door, door.client() as client:
        late = client.post("/v1/images/generations", json={"prompt": "a slow fox"})
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "TimedOut"
        job = last_job(client, "a slow fox")
        wait_until(lambda: client.get(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled")


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_curl_gets_a_picture(door):
    command = ["curl", "--silent", "--noproxy", "*", f"{door.url}/v1/images/generations", "-H",
               "Content-Type: application/json", "-d", '{"prompt": "a fox", "num_inference_steps": 2}']  # fmt: skip
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert base64.b64decode(json.loads(done.stdout)["data"][0]["b64_json"]).startswith(b"\x89PNG")
