"""The web UI's API, with the requests that Open WebUI and SillyTavern send."""

from __future__ import annotations

import base64
import json
import threading

import httpx
import pytest

from tests.chaos.pictures import expected_count, shown_count
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("worker")

SILLY_TAVERN = {
    "prompt": "a fox", "negative_prompt": "a cat", "sampler_name": "DPM++ 2M", "scheduler": "Karras", "steps": 3,
    "cfg_scale": 7, "width": 8, "height": 8, "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent",
    "hr_scale": 2, "hr_additional_modules": [], "denoising_strength": 0.7, "hr_second_pass_steps": 0, "seed": 7,
    "override_settings": {"CLIP_stop_at_last_layers": 1}, "override_settings_restore_afterwards": True,
    "clip_skip": 1, "save_images": True, "send_images": True, "do_not_save_grid": False, "do_not_save_samples": False,
}  # fmt: skip
OPEN_WEBUI = {"prompt": "a fox", "batch_size": 2, "width": 8, "height": 8, "steps": 2, "negative_prompt": ""}


def test_a_request_of_silly_tavern_gets_its_picture(client):
    answer = client.post("/sdapi/v1/txt2img", json=SILLY_TAVERN)
    assert answer.status_code == 200, answer.text
    (image,) = answer.json()["images"]
    assert shown_count(base64.b64decode(image)) == expected_count(7, 3)
    info = json.loads(answer.json()["info"])
    assert (info["seed"], info["sampler_name"], info["steps"]) == (7, "dpmsolver++", 3)
    assert answer.json()["parameters"] == SILLY_TAVERN


def test_a_request_of_open_webui_gets_its_pictures(client):
    answer = client.post("/sdapi/v1/txt2img", json=OPEN_WEBUI)
    assert len(answer.json()["images"]) == 2


def test_a_seed_of_minus_one_is_drawn(client):
    answer = client.post("/sdapi/v1/txt2img", json={**OPEN_WEBUI, "seed": -1, "n_iter": 2})
    assert len(set(json.loads(answer.json()["info"])["all_seeds"])) == 4


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompt": "a fox", "enable_hr": True}, "enable_hr must be off"),
        ({"prompt": "a fox", "scheduler": "SGM Uniform"}, "scheduler must be one of automatic, karras"),
        ({"prompt": "a fox", "sampler_name": "UniPC 2"}, "sampler must be one of"),
        ({"prompt": "a fox", "batch_size": 17}, "at most 16"),
        ({"prompt": "a (fox:1.2.3)"}, "prompt must have numbers as weights, like (word:1.3), got '1.2.3'"),
        ({"prompt": "a fox", "typo": 1}, "'typo' is no field of this request"),
    ],
)
def test_what_cannot_be_had_is_refused(client, wrong, words):
    answer = client.post("/sdapi/v1/txt2img", json=wrong)
    assert answer.status_code == 400
    assert words in answer.json()["detail"]


def test_the_lists_name_what_is_served(client):
    assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "embedded"
    assert [model["title"] for model in client.get("/sdapi/v1/sd-models").json()] == ["embedded"]
    samplers = client.get("/sdapi/v1/samplers").json()
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= {sampler["name"] for sampler in samplers}
    assert "karras" in [scheduler["name"] for scheduler in client.get("/sdapi/v1/schedulers").json()]
    for sampler in samplers:
        body = {"prompt": "a fox", "steps": 1, "sampler_name": sampler["name"]}
        assert client.post("/sdapi/v1/txt2img", json=body).status_code == 200, sampler


def test_only_the_model_that_is_served_may_be_chosen(client):
    assert client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "embedded"}).status_code == 200
    answer = client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "other"})
    assert (answer.status_code, "'embedded'" in answer.json()["detail"]) == (400, True)


def test_progress_shows_the_picture_as_it_forms_and_interrupt_ends_it(door, client):
    answers: list[httpx.Response] = []

    def ask() -> None:
        with door.client() as other:
            answers.append(other.post("/sdapi/v1/txt2img", json={"prompt": "a fox", "steps": 1000, "seed": 5}))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        progress = wait_until(
            lambda: (found := client.get("/sdapi/v1/progress").json())["current_image"] and found, "a preview"
        )
        assert 0 < progress["progress"] < 1
        assert progress["state"]["sampling_steps"] == 1000
        assert shown_count(base64.b64decode(progress["current_image"])) > expected_count(5, 0)
    finally:
        client.post("/sdapi/v1/interrupt")
        thread.join(60)
    assert answers[0].status_code == 410
    assert answers[0].json()["code"] == "JobCancelled"
