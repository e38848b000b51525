"""OpenAI's own client, and curl, against the door."""

from __future__ import annotations

import base64

import pytest
from openai import OpenAI

from tests.chaos.pictures import expected_count, shown_count
from tests.http.doors import DoorProcess

pytestmark = pytest.mark.usefixtures("worker")


@pytest.fixture
def openai(door: DoorProcess) -> OpenAI:
    return OpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0)


def test_a_picture_comes_back_in_base64(openai: OpenAI) -> None:
    answer = openai.images.generate(prompt="a fox", extra_body={"seed": 7, "num_inference_steps": 3})
    assert answer.data is not None
    assert shown_count(base64.b64decode(answer.data[0].b64_json)) == expected_count(7, 3)
