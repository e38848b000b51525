"""Bad parameters: one clear error each, at the client and again in the worker."""

from __future__ import annotations

import dataclasses
import json
import math
from decimal import Decimal

import pytest

from sdtpu_worker import GenerationRequest, GenerationResult, InvalidRequest
from sdtpu_worker.contract.request import check_arguments, draw_seed, seed_from_task_id
from sdtpu_worker.contract.result import BatchPlace, StoredImage, Timings
from sdtpu_worker.redaction import brief

BAD = [
    ((), {}, "prompt is missing"),
    (("",), {}, "prompt must not be empty"),
    ((" \n\t ",), {}, "prompt must not be empty"),
    ((7,), {}, "prompt must be a string, got int: 7"),
    ((None,), {}, "prompt must be a string, got NoneType"),
    ((["a fox"],), {}, "prompt must be a string, got list"),
    (("a" * 10_001,), {}, "prompt must have at most 10,000 characters, got 10,001"),
    (("a\x00fox",), {}, r"prompt must not have control characters, got '\\x00' at position 1"),
    (("a\x1b[31m",), {}, "control characters"),
    (("a\ud800",), {}, "control characters"),
    (("a",), {"negative_prompt": 7}, "negative_prompt must be a string"),
    (("a",), {"negative_prompt": "\x07"}, "negative_prompt must not have control characters"),
    (("a",), {"num_inference_steps": 0}, "num_inference_steps must be an integer from 1 to 1000, got 0"),
    (("a",), {"num_inference_steps": 1001}, "got 1001"),
    (("a",), {"num_inference_steps": 30.0}, "got 30.0"),
    (("a",), {"num_inference_steps": True}, "got True"),
    (("a",), {"guidance_scale": math.nan}, "guidance_scale must be a finite number .*got nan"),
    (("a",), {"guidance_scale": math.inf}, "got inf"),
    (("a",), {"guidance_scale": 1e30}, r"got 1e\+30"),
    (("a",), {"guidance_scale": "7.5"}, "got '7.5'"),
    (("a",), {"sigmas": "cosine"}, "sigmas must be one of karras, exponential, beta, got 'cosine'"),
    (("a",), {"eta": 1.5}, "eta must be a number from 0 to 1, got 1.5"),
    (("a",), {"eta": math.nan}, "eta must be a number from 0 to 1, got nan"),
    (("a",), {"guidance_rescale": "0.7"}, "guidance_rescale must be a number from 0 to 1, got '0.7'"),
    (("a",), {"clip_skip": -1}, "clip_skip must be an integer from 0 to 11, got -1"),
    (("a",), {"clip_skip": True}, "clip_skip must be an integer"),
    (("a",), {"prompt_2": 7}, "prompt_2 must be a string, got int: 7"),
    (("a",), {"negative_prompt_2": "\x07"}, "negative_prompt_2 must not have control characters"),
    (("a",), {"original_size": 512}, "original_size must be two integers from 1 to 65,536, the vertical one first"),
    (("a",), {"target_size": [512, 0]}, "target_size must be two integers from 1"),
    (("a",), {"crops_coords_top_left": [-1, 0]}, "crops_coords_top_left must be two integers from 0 to 65,536"),
    (("a",), {"crops_coords_top_left": [1.0, True]}, "crops_coords_top_left must be two integers"),
    (("a",), {"height": 63}, "height must be a multiple of 8 up to 4096 pixels, got 63"),
    (("a",), {"width": 0}, "width must be a multiple of 8"),
    (("a",), {"width": 8192}, "got 8192"),
    (("a",), {"sampler": "nonesuch"}, "sampler must be one of pndm, ddim, ddpm, euler, .*got 'nonesuch'"),
    (("a",), {"sampler": ["pndm"]}, "sampler must be one of"),
    (("a",), {"image_format": "gif"}, "image_format must be one of png, jpeg, webp, got 'gif'"),
    (("a",), {"seed": -1}, r"seed must be an integer from 0 to 2\*\*63 - 1, or a string of .* digits, got -1"),
    (("a",), {"seed": 2**63}, "seed must be"),
    (("a",), {"seed": 1.0}, "seed must be"),
    *(
        (("a",), {"seed": text}, "seed must be an integer .*got '")
        for text in ("", " 7", "+7", "-7", "7.0", "1e3", "0x7", "1_000", "٣", str(2**63), "9" * 5000, "seven", "7\n")
    ),
    (("a",), {"stepz": 3}, "unknown parameter 'stepz'; the parameters are prompt, negative_prompt, seed"),
    (("a", "b"), {}, "only the prompt is positional, got 2"),
    (("a",), {"prompt": "b"}, "given twice"),
    (("a",), {"tenant": ""}, "tenant must be a string of 1 to 128 characters, got ''"),
    (("a",), {"tenant": "x" * 129}, "tenant must be a string of 1 to 128 characters, got 'xxx"),
    (("a",), {"tenant": 7}, "tenant must be a string of 1 to 128 characters, got 7"),
    (("a",), {"tenant": "a\nb"}, r"tenant must not have control characters, got 'a\\nb'"),
    (("a",), {"tenant": "a\ud800"}, "tenant must not have control characters"),
]
HUGE = (10**400, -(10**400), 10**5000, [[10**5000]], {10**5000: 10**5000}, Decimal("1e999999"))
"""Numbers that no float can hold, or that Python refuses to write out."""


def test_no_negative_prompt_may_be_written_as_none():
    """diffusers' pipelines take None for it, and their default is None."""
    assert GenerationRequest.parse(("a",), {"negative_prompt": None}) == GenerationRequest("a")


@pytest.mark.parametrize(("args", "kwargs", "message"), BAD)
def test_a_bad_parameter_gets_an_error_that_says_what_is_allowed(args, kwargs, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        GenerationRequest.parse(args, kwargs)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("number", HUGE, ids=range(len(HUGE)))
@pytest.mark.parametrize("name", [*(field.name for field in dataclasses.fields(GenerationRequest)), "tenant", "stepz"])
def test_a_number_of_any_size_gets_the_same_clear_error_in_every_parameter(name, number):
    """A guidance scale of 10**400 was an OverflowError, an integer of 5,000 digits a ValueError."""
    args, kwargs = ((), {name: number}) if name == "prompt" else (("a",), {name: number})
    for check in (GenerationRequest.parse, check_arguments):
        with pytest.raises(InvalidRequest, match=name) as caught:
            check(args, kwargs)
        assert len(str(caught.value)) < 700
    if name not in ("tenant", "stepz"):
        with pytest.raises(InvalidRequest, match=name):
            GenerationRequest(**{"prompt": "a", name: number})
    with pytest.raises(InvalidRequest, match="prompt must be a string"):
        check_arguments((number,), {})


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no text for you")


class TwoLines:
    def __repr__(self) -> str:
        return "one\ntwo"


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def test_any_value_has_a_short_text_on_one_line():
    assert brief(7) == "7"
    assert brief("a fox") == "'a fox'"
    assert brief(10**5000) == brief(-(10**5000)) == "an integer of about 5,001 digits"
    assert "an integer of about 401 digits" in brief({"a": [10**400]})
    assert brief(TwoLines()) == "one two"
    itself: list = []
    itself.append(itself)
    for value in (*HUGE, Broken(), [Broken()], "x" * 10**6, b"x" * 10**6, list(range(10**5)), nested(10**5), itself):
        assert len(brief(value)) < 700


@pytest.mark.parametrize(
    "kwargs", [{}, {"seed": 2**63 - 1, "num_inference_steps": 1000, "guidance_scale": 1, "target_size": [8, 16]}]
)
def test_good_parameters_cross_json_unchanged(kwargs):
    request = GenerationRequest.parse(("an ünïcode 🦊\nin two lines",), kwargs)
    assert GenerationRequest.parse((), json.loads(json.dumps(request.to_json()))) == request


def test_the_documented_defaults():
    assert GenerationRequest("a fox").to_json() == {
        "prompt": "a fox",
        "negative_prompt": "",
        "seed": None,
        "num_inference_steps": None,
        "guidance_scale": None,
        "height": None,
        "width": None,
        "sampler": None,
        "image_format": "png",
        "sigmas": None,
        "eta": None,
        "image": None,
        "strength": None,
        "mask_image": None,
        "preserve_unmasked": True,
        "image_guidance_scale": None,
        "control_image": None,
        "controlnet": None,
        "controlnet_conditioning_scale": (1.0,),
        "control_guidance_start": (0.0,),
        "control_guidance_end": (1.0,),
        "loras": (),
        "prompt_syntax": "plain",
        "guidance_rescale": 0.0,
        "clip_skip": 0,
        "prompt_2": None,
        "negative_prompt_2": None,
        "original_size": None,
        "target_size": None,
        "crops_coords_top_left": None,
    }
    assert GenerationRequest("a fox").with_defaults("ddim").parameters() == {
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "sampler": "ddim",
    }
    few = GenerationRequest("a fox", guidance_scale=0).with_defaults("lcm", 4, 1.0)
    assert few.parameters() == {"num_inference_steps": 4, "guidance_scale": 0.0, "sampler": "lcm"}


def test_what_else_was_asked_for_is_reported_and_nothing_that_was_not():
    assert GenerationRequest("a", eta=None, clip_skip=0, guidance_rescale=0).options() == {}
    request = GenerationRequest("a", sigmas="karras", eta=1, prompt_2="b", target_size=(8, 16))
    assert request.options() == {"sigmas": "karras", "eta": 1.0, "prompt_2": "b", "target_size": [8, 16]}


def test_a_tenant_is_checked_but_is_no_parameter_of_the_image():
    request = GenerationRequest.parse(("a",), {"seed": 3, "tenant": "Ümlaut & Söhne"})
    assert request == GenerationRequest.parse(("a",), {"seed": 3}) == GenerationRequest.parse((), request.to_json())
    assert GenerationRequest.parse(("a",), {"seed": 3, "tenant": None}) == request


def test_partial_arguments_are_checked_as_far_as_they_go():
    check_arguments((), {"seed": 3})
    with pytest.raises(InvalidRequest, match="seed"):
        check_arguments((), {"seed": -3})


def test_the_seed_of_a_task_without_one_follows_from_its_id():
    request = GenerationRequest("a fox")
    assert request.with_seed("abc").seed == seed_from_task_id("abc") == request.with_seed("abc").seed
    assert 0 <= seed_from_task_id("abc") < 2**53
    assert seed_from_task_id("abc") != seed_from_task_id("abd")
    assert GenerationRequest("a", seed=5).with_seed("abc").seed == 5


@pytest.mark.parametrize("seed", [0, 7, 2**53 + 1, 2**63 - 1])
def test_a_seed_may_be_a_string_of_its_decimal_digits(seed):
    """A browser cannot write a seed of more than 53 bits as a number."""
    check_arguments((), {"seed": str(seed)})
    for text in (str(seed), str(seed).zfill(19)):
        request = GenerationRequest.parse(("a",), {"seed": text})
        assert request == GenerationRequest("a", seed=seed)
        assert type(request.seed) is int
        assert json.loads(json.dumps(request.to_json()))["seed"] == seed


def test_a_seed_that_nobody_chose_survives_the_numbers_of_javascript():
    """63 bits were drawn and a double carries 53: sent back by a browser it was another seed and another picture."""
    seeds = [draw_seed() for _ in range(200)] + [seed_from_task_id(str(i)) for i in range(200)]
    assert [int(float(seed)) for seed in seeds] == seeds
    assert max(seeds) > 2**52, "and all 53 bits are used"
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("seed", [3, 2**53 + 1, 2**63 - 1])
def test_a_result_tells_the_seed_as_text_too_which_a_browser_can_send_back(seed):
    image, timings, place = StoredImage("redis:x", "png", 8, 8, 1), Timings(0.0, 0.0, 0.0), BatchPlace(0, 0, 1, 1)
    result = GenerationResult("t", image, "a", "", seed, 1, 7.5, "ddim", "m", False, None, timings, place)
    data = json.loads(json.dumps(result.to_json()), parse_int=lambda digits: int(float(digits)))  # as JavaScript does
    assert GenerationRequest("a", seed=data["seed_text"]).seed == seed
    assert GenerationResult.from_json(result.to_json()) == result
    older = {name: value for name, value in result.to_json().items() if name not in ("seed_text", "options", "loras")}
    assert GenerationResult.from_json(older) == result


def test_a_result_crosses_json_unchanged():
    data = {
        "task_id": "t",
        "image": {"uri": "redis:sdtpu:image:t", "format": "png", "width": 64, "height": 64, "bytes": 5},
        "prompt": "a",
        "negative_prompt": "",
        "seed": 1,
        "seed_text": "1",
        "num_inference_steps": 2,
        "guidance_scale": 7.5,
        "sampler": "ddim",
        "model": "m",
        "prompt_truncated": False,
        "nsfw_content_detected": None,
        "timings": {"queued_s": 0.1, "device_s": 0.2, "total_s": 0.3},
        "batch": {"device": 0, "slot": 0, "occupied": 1, "num_slots": 8},
        "options": {"sigmas": "karras"},
        "loras": [{"name": "a.safetensors", "weight": 0.5}],
        "reused": False,
    }
    assert GenerationResult.from_json(data).to_json() == data


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, ()),
        ([], ()),
        (["pixel"], (("pixel", 1.0),)),
        ([("pixel", 0.8)], (("pixel", 0.8),)),
        ([["pixel", -100], "toy"], (("pixel", -100.0), ("toy", 1.0))),
        (["a", "b", "c", "d"], (("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 1.0))),
        (["ab"], (("ab", 1.0),)),
    ],
)
def test_loras_are_names_or_pairs_and_are_kept_as_pairs(given, kept):
    request = GenerationRequest.parse(("a fox",), {"loras": given})
    assert request.loras == kept
    assert request.options() == ({"loras": [list(pair) for pair in kept]} if kept else {})
    assert GenerationRequest.parse((), json.loads(json.dumps(request.to_json()))) == request


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("pixel", "loras must be a list of at most 4 names or pairs of name and weight"),
        ({"pixel": 0.8}, "loras must be a list"),
        (["a", "b", "c", "d", "e"], "loras must be a list of at most 4"),
        (["pixel", 0.8], "loras: a LoRA must be a name of 1 to 128 characters, got 0.8"),
        ([["pixel", 0.8, 1]], "loras: a LoRA must be a name"),
        ([["", 0.8]], "loras: a LoRA must be a name"),
        ([["pixel", float("nan")]], "finite weights from -100 to 100, got nan for 'pixel'"),
        ([["pixel", float("inf")]], "finite weights from -100 to 100, got inf"),
        ([["pixel", 101]], "finite weights from -100 to 100, got 101"),
        ([["pixel", 10**400]], "finite weights from -100 to 100"),
        ([["pixel", True]], "finite weights"),
        ([["pixel", None]], "finite weights"),
        (["pixel", ("pixel", 0.5)], "loras must name each LoRA once"),
    ],
)
def test_other_loras_are_refused(given, text):
    with pytest.raises(InvalidRequest, match=text):
        GenerationRequest("a fox", loras=given)
