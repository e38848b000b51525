"""Pictures that callers send, by each of the APIs: what reaches the worker, and whose pictures may be meant."""

from __future__ import annotations

import base64
import io

import pytest
from openai import BadRequestError, OpenAI
from PIL import Image
from redis import Redis

from sdtpu_worker.errors import InvalidRequest
from sdtpu_worker.http.pictures_in import fit_mask, fit_picture, mask_of_transparency, read_base64
from tests.http.doors import keys, start_door, wait_for_end

pytestmark = pytest.mark.usefixtures("worker")


def encode(picture: Image.Image, image_format: str = "png") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format)
    return buffer.getvalue()


RED = encode(Image.new("RGB", (8, 8), "red"))
DATA_URI = "data:image/png;base64," + base64.b64encode(RED).decode()
HALF_CLEAR = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
HALF_CLEAR.paste((0, 0, 0, 0), (0, 0, 4, 8))


@pytest.fixture
def openai(door) -> OpenAI:
    return OpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)


def options_of(client, job_id: str) -> dict:
    return wait_for_end(client, job_id)["result"]["options"]


def test_an_edit_of_openais_client_has_its_picture_and_mask(openai, client):
    answer = openai.images.edit(
        image=RED, mask=encode(HALF_CLEAR), prompt="a fox", n=2,
        extra_body={"seed": "5", "num_inference_steps": 2, "strength": 0.5},
    )  # fmt: skip
    assert [picture.seed for picture in answer.data] == [5, 6]
    options = options_of(client, answer.data[0].job_id)
    assert options == {"image": "a picture", "mask_image": "a picture", "strength": 0.5}


def test_an_edit_can_be_streamed(openai):
    events = openai.images.edit(image=RED, prompt="a fox", stream=True, extra_body={"num_inference_steps": 2})
    assert [event.type for event in events][-1].endswith("completed")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"image": b"no picture"}, "image must be a PNG"),
        ({"image": RED, "size": "9x9"}, "size must be width x height in multiples of 8"),
        ({"image": [RED, RED]}, "one picture"),
        ({"image": RED, "mask": b"no picture"}, "mask must be a PNG"),
        ({"image": RED, "extra_body": {"strength": "much"}}, "strength must be"),
        ({"image": RED, "extra_body": {"width": "8"}}, "width and height must be given together"),
        ({"image": RED, "extra_body": {"width": "8", "height": "eight"}}, "height must be"),
        ({"image": RED, "extra_body": {"width": "9", "height": "8"}}, "size must be width x height in multiples of 8"),
    ],
)
def test_a_wrong_edit_is_explained(openai, wrong, words):
    with pytest.raises(BadRequestError, match=words):
        openai.images.edit(prompt="a fox", **wrong)


def test_what_is_no_form_or_too_large_is_refused(client):
    assert client.post("/v1/images/edits", json={}).status_code == 415
    cut = client.post("/v1/images/edits", content=b"x", headers={"Content-Type": "multipart/form-data"})
    assert cut.status_code == 400
    large = {"image": ("a.png", b"\0" * 17_000_000)}
    assert client.post("/v1/images/edits", files=large, data={"prompt": "a fox"}).status_code == 413


def test_the_web_uis_clients_send_pictures_in_base64(client):
    body = {"prompt": "a fox", "init_images": [DATA_URI], "denoising_strength": 0.4, "steps": 2, "width": 16,
            "height": 16, "mask": base64.b64encode(encode(Image.new("L", (8, 8), 255))).decode(), "resize_mode": 0,
            "inpainting_fill": 1, "mask_blur": 4}  # fmt: skip
    answer = client.post("/sdapi/v1/img2img", json=body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["images"]) == 1
    assert "init_images" not in answer.json()["parameters"]
    for images in ([], [DATA_URI, DATA_URI], ["no base64!"], [7], None):
        assert client.post("/sdapi/v1/img2img", json={**body, "init_images": images}).status_code == 400


def test_a_job_starts_from_a_data_uri_or_from_an_earlier_job(client, redis_url):
    small = {"prompt": "a fox", "num_inference_steps": 2}
    first = client.post("/v1/jobs", json={**small, "image": DATA_URI}).json()
    assert first["parameters"]["image"] == "a picture"
    assert options_of(client, first["id"]) == {"image": "a picture"}
    second = client.post("/v1/jobs", json={**small, "image": f"job:{first['id']}", "strength": 0.3}).json()
    assert options_of(client, second["id"]) == {"image": "a picture", "strength": 0.3}


@pytest.mark.parametrize("name", ["image", "control_image"])
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/images/generations"])
@pytest.mark.parametrize(
    "reference",
    [
        "redis:sdtpu:image:{id}",
        "file:///etc/passwd",
        "https://example.org/a.png",
        {"image": {"uri": "redis:sdtpu:image:{id}"}},
        ["{id}"],
        7,
    ],
)
def test_no_place_of_a_store_can_be_named(client, path, name, reference):
    answer = client.post(path, json={"prompt": "a fox", name: reference})
    assert answer.status_code == 400
    assert "data URI" in answer.text


def test_several_pictures_for_controlnets_are_each_looked_at(client):
    body = {"prompt": "a fox", "num_inference_steps": 2, "controlnet": ["edges", "depth"]}
    job = client.post("/v1/jobs", json={**body, "control_image": [DATA_URI, DATA_URI]}).json()
    assert job["parameters"]["control_image"] == "a picture"
    answer = client.post("/v1/jobs", json={**body, "control_image": [DATA_URI, "redis:sdtpu:image:other"]})
    assert answer.status_code == 400


def test_the_picture_of_another_callers_job_cannot_be_started_from(redis_url, tmp_path):
    with start_door(redis_url, tmp_path, SDTPU_HTTP_KEYS=keys(ann="", bob="")) as door:
        with door.client("sk-ann") as ann, door.client("sk-bob") as bob:
            job = ann.post("/v1/jobs", json={"prompt": "a fox", "num_inference_steps": 2}).json()
            wait_for_end(ann, job["id"])
            body = {"prompt": "a fox", "image": f"job:{job['id']}"}
            assert bob.post("/v1/jobs", json=body).status_code == 404
            assert ann.post("/v1/jobs", json=body).status_code == 202


def test_nothing_is_stored_for_a_request_that_is_refused(client, redis_url):
    blue = base64.b64encode(encode(Image.new("RGB", (8, 8), "blue"))).decode()
    with Redis.from_url(redis_url) as redis:
        before = set(redis.keys("sdtpu:image:*"))
        body = {"prompt": " ", "image": f"data:image/png;base64,{blue}"}
        assert client.post("/v1/jobs", json=body).status_code == 400
        assert set(redis.keys("sdtpu:image:_picture*")) <= before


# What becomes of a picture


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_a_picture_is_scaled_to_the_size_that_is_asked_for():
    assert fit_picture("image", RED, None) == fit_picture("image", RED, (8, 8)) == RED
    assert opened(fit_picture("image", RED, (16, 24))).size == (16, 24)
    with pytest.raises(InvalidRequest, match="multiples of 8"):
        fit_picture("image", RED, (16, 7))


def test_a_mask_is_light_where_the_picture_is_drawn_again():
    mask = opened(mask_of_transparency("mask", encode(HALF_CLEAR), (16, 16)))
    assert (mask.size, mask.mode) == ((16, 16), "L")
    assert (mask.getpixel((0, 0)), mask.getpixel((15, 0))) == (255, 0)
    light = encode(Image.new("L", (8, 8), 200))
    assert opened(mask_of_transparency("mask", light, None)).getpixel((0, 0)) == 255
    assert opened(fit_mask("mask", light, None, is_inverted=True)).getpixel((0, 0)) == 0


def test_base64_is_read_with_and_without_its_start():
    assert read_base64("image", DATA_URI) == read_base64("image", DATA_URI.partition(",")[2]) == RED
