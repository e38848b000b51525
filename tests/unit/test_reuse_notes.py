"""What Redis keeps for reuse: read back as written, refused in every other form, and who may wait for whom."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdtpu_worker.contract.result import BatchPlace
from sdtpu_worker.reuse.notes import MAX_LEAD_BYTES, MAX_POINTER_BYTES, Lead, Pointer, token_of

POINTER = Pointer.of("an-id", b"image", False, BatchPlace(1, 0, 2, 8))
LEAD = Lead(token_of("an-id"), 6, 1_795_875_600.5, True, False, 12, 30, 4.25)


@pytest.mark.parametrize("nsfw", [None, True, False])
def test_a_pointer_is_read_as_it_was_written(nsfw):
    pointer = Pointer.of("ü" * 255, b"image", nsfw, BatchPlace(7, 3, 30, 32))
    assert Pointer.from_bytes(pointer.to_bytes()) == pointer
    assert len(pointer.to_bytes()) < MAX_POINTER_BYTES


def test_a_pointer_tells_its_image_from_any_other():
    assert POINTER.names(b"image")
    assert not POINTER.names(b"image.")
    assert not POINTER.names(b"imagf")


GOOD = json.loads(POINTER.to_bytes())


@pytest.mark.parametrize(
    "value",
    [
        [],
        "text",
        {"task_id": "x"},
        None,
        [None, *GOOD[1:]],
        ["", *GOOD[1:]],
        ["x" * 256, *GOOD[1:]],
        [GOOD[0], -1, *GOOD[2:]],
        [GOOD[0], True, *GOOD[2:]],
        [GOOD[0], 1.5, *GOOD[2:]],
        [GOOD[0], 2**40, *GOOD[2:]],
        [*GOOD[:2], "f" * 63, *GOOD[3:]],
        [*GOOD[:2], "F" * 64, *GOOD[3:]],
        [*GOOD[:3], 0, GOOD[4]],
        [*GOOD[:3], "no", GOOD[4]],
        [*GOOD[:4], [1, 2, 3]],
        [*GOOD[:4], [1, 2, 3, "4"]],
        [*GOOD[:4], 5],
        [*GOOD, 6],
    ],
)
def test_what_is_no_pointer_is_none(value):
    assert Pointer.from_bytes(json.dumps(value).encode()) is None


@given(st.binary(max_size=300))
def test_any_bytes_are_a_pointer_and_a_lead_or_none(data):
    assert Pointer.from_bytes(data) is None
    assert Lead.from_bytes(data) is None


def test_more_bytes_than_a_pointer_has_are_not_read():
    assert Pointer.from_bytes(POINTER.to_bytes() + b" " * MAX_POINTER_BYTES) is None
    assert Pointer.from_bytes(b"[" * 2000) is None


@pytest.mark.parametrize(
    "lead",
    [
        LEAD,
        Lead(token_of("x"), 0),
        replace(LEAD, expires_at=math.inf, eta_s=None),
        replace(LEAD, priority=9, pending=True, had_slot=False, current=1000, total=1000, eta_s=86_400.0),
    ],
)
def test_a_lead_is_read_as_it_was_written(lead):
    assert Lead.from_bytes(lead.to_bytes()) == lead
    assert len(lead.to_bytes()) < MAX_LEAD_BYTES


@pytest.mark.parametrize(
    ("old", "new"), [(" ", "  "), ("6", "-6"), ("4250", "nan"), ("1795875600.500", "1.2.3"), (" 1 ", " 2 ")]
)
def test_what_is_no_lead_is_none(old, new):
    text = LEAD.to_bytes().decode()
    assert old in text
    assert Lead.from_bytes(text.replace(old, new, 1).encode()) is None


def test_a_job_waits_only_for_one_that_is_as_urgent():
    assert LEAD.serves(LEAD)
    assert LEAD.serves(replace(LEAD, priority=7))
    assert not LEAD.serves(replace(LEAD, priority=5))


def test_a_job_that_expires_earlier_waits_only_for_one_that_has_a_slot():
    waiting = replace(LEAD, had_slot=False)
    earlier, forever = replace(LEAD, expires_at=LEAD.expires_at - 5), replace(LEAD, expires_at=math.inf)
    assert waiting.serves(waiting)
    assert waiting.serves(forever)
    assert not waiting.serves(earlier)
    assert not replace(waiting, expires_at=math.inf).serves(waiting)
    assert LEAD.serves(earlier), "it has its slot"


def test_tasks_have_tokens_of_their_own_which_say_nothing_of_their_ids():
    assert token_of("a") == token_of("a") != token_of("b")
    assert len(token_of("x y\n" * 100)) == 32
