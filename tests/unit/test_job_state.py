"""What anybody stored of a job, as the door and the commands read it: nothing raises, nothing is built from it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st

from sdtpu_worker.contract.result import BatchPlace, GenerationResult, StoredImage, Timings
from sdtpu_worker.web.job_records import JobRecord
from sdtpu_worker.web.job_state import ENDED, QUEUED, JobState, read_state
from sdtpu_worker.web.job_view import job_json

BACKEND = Celery("states", backend="redis://127.0.0.1:1/0", set_as_current=False).backend
RESULT = GenerationResult(
    "an-id", StoredImage("redis:sdtpu:image:an-id", "png", 8, 8, 70), "a fox", "", 7, 3, 7.5, "ddim", "fake", False,
    None, Timings(0.1, 0.2, 0.3), BatchPlace(0, 0, 1, 4), {"image": "redis:sdtpu:image:other"},
).to_json()  # fmt: skip


def stored(status: Any, result: Any) -> bytes:
    return json.dumps({"status": status, "result": result, "task_id": "an-id"}).encode()


def read(status: Any, result: Any = None) -> JobState:
    return read_state(BACKEND, stored(status, result))


@pytest.mark.parametrize(
    ("state", "status"),
    [
        (read_state(BACKEND, None), "queued"),
        (read("PENDING"), "queued"),
        (read("RETRY", {"exc_type": "OSError"}), "queued"),
        (read("STARTED", {"pid": 1}), "running"),
        (read("PROGRESS", {"current": 1, "total": 2, "percent": 50, "pending": False}), "running"),
        (read("PROGRESS", {"current": 1, "total": 2, "percent": 50, "pending": True}), "queued"),
        (read("SUCCESS", RESULT), "succeeded"),
        (read("SUCCESS", 7), "failed"),
        (read("FAILURE", {"exc_type": "InvalidRequest", "exc_message": ["no"]}), "failed"),
        (read("REVOKED", {"exc_type": "TaskRevokedError", "exc_message": ["expired"]}), "cancelled"),
        (read("WHATEVER", RESULT), "queued"),
    ],
)
def test_celerys_states_have_plain_names(state, status):
    assert state.status == status
    assert state.has_ended == (status in ENDED)


def test_an_error_is_its_class_and_its_text_without_passwords():
    state = read("FAILURE", {"exc_type": "StorageError", "exc_module": "os", "exc_message": ["redis://u:pw@h is", 7]})
    assert state.error is not None
    assert (state.error.type, state.error.detail) == ("StorageError", "redis://u:**@h is 7")


def test_a_preview_is_the_data_of_a_png_and_nothing_else():
    progress = {"percent": 1, "preview": "data:image/png;base64,AAAA"}
    assert read("PROGRESS", progress).preview == "AAAA"
    for other in ("data:text/html;base64,AAAA", "https://example.org/a.png", 7, "data:image/png;base64," + "A" * 2**20):
        assert read("PROGRESS", {**progress, "preview": other}).preview is None


def test_what_json_has_not_is_not_shown():
    assert read("PROGRESS", {"percent": 1, "eta_s": float("nan")}).progress["eta_s"] is None
    assert read("SUCCESS", {**RESULT, "guidance_scale": float("inf")}).status == "failed"


def test_states_are_told_apart_by_their_tokens():
    states = [read("STARTED"), read("PROGRESS", {"percent": 1}), read("PROGRESS", {"percent": 2}), QUEUED]
    assert len({state.token for state in states}) == len(states)


def test_clients_see_no_place_in_the_store():
    record = JobRecord("", {"prompt": "a fox", "seed": 7, "image": "redis:sdtpu:image:other"})
    assert "sdtpu:image" not in json.dumps(job_json(record, read("SUCCESS", RESULT), "http://localhost/v1/jobs"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)
FIELDS = st.sampled_from(
    ["current", "total", "percent", "pending", "eta_s", "preview", "exc_type", "exc_message", "image"]
)


@given(
    st.sampled_from(["PENDING", "STARTED", "PROGRESS", "SUCCESS", "FAILURE", "REVOKED"]) | JSON,
    st.dictionaries(FIELDS, JSON) | JSON,
)
def test_whatever_is_stored_can_be_read_and_shown(status, result):
    state = read(status, result)
    shown = job_json(JobRecord("", {"prompt": "a fox", "seed": 7}), state, "http://localhost/v1/jobs")
    assert json.loads(json.dumps(shown, allow_nan=False))["status"] == state.status


@given(st.binary())
def test_bytes_of_any_kind_are_a_failure_or_a_state(data):
    assert isinstance(read_state(BACKEND, data), JobState)


def test_a_client_sees_whether_an_image_was_reused():
    for reused in (False, True):
        state = read("SUCCESS", {**RESULT, "reused": reused})
        shown = job_json(JobRecord("", {"prompt": "a fox", "seed": 7}), state, "http://door/v1/jobs")
        assert shown["result"]["reused"] is reused
