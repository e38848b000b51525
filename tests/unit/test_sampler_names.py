"""What a job may call a sampler."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.contract.samplers import (
    DIFFUSERS_CLASSES,
    OTHER_NAMES,
    SAMPLER_NAMES,
    resolve_sampler,
)
from sdtpu_worker.errors import InvalidRequest


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("pndm", ("pndm", None)),
        ("PLMS", ("pndm", None)),
        ("EulerAncestralDiscreteScheduler", ("euler_ancestral", None)),
        ("Euler a", ("euler_ancestral", None)),
        ("euler_a", ("euler_ancestral", None)),
        ("DPM++ 2M", ("dpmsolver++", None)),
        ("DPM++ 2M Karras", ("dpmsolver++", "karras")),
        ("dpm++_2m_karras", ("dpmsolver++", "karras")),
        ("DPM++ 2M SDE Karras", ("sde-dpmsolver++", "karras")),
        ("DPM++ 2M SDE Exponential", ("sde-dpmsolver++", "exponential")),
        ("DPM++ SDE Karras", ("dpmsolver++_sde", "karras")),
        ("DPM2 a Karras", ("dpm2_ancestral", "karras")),
        ("LMS Karras", ("lms", "karras")),
        ("Heun beta", ("heun", "beta")),
        ("UniPC", ("unipc", None)),
        ("LCM", ("lcm", None)),
    ],
)
def test_the_names_that_people_write_are_understood(name, meaning):
    assert resolve_sampler(name) == meaning
    assert resolve_sampler(name.upper()) == meaning


def test_every_name_of_the_tables_means_its_sampler_and_no_other():
    for names in (DIFFUSERS_CLASSES, OTHER_NAMES):
        for sampler, others in names.items():
            assert sampler in SAMPLER_NAMES
            for other in (sampler, *others):
                assert resolve_sampler(other) == (sampler, None)


@pytest.mark.parametrize("name", ["", "x", "DPM++ 2S a", "dpm fast", "eulr", "Karras", "e" * 10_000, 7, None, ["pndm"]])
def test_a_name_that_is_not_known_lists_those_that_are(name):
    with pytest.raises(InvalidRequest, match=r"sampler must be one of pndm, ddim, ddpm, euler, .*, tcd, got"):
        resolve_sampler(name)


def test_the_nearest_sampler_is_suggested():
    with pytest.raises(InvalidRequest, match=r"got 'DPM\+\+ 2M Karas'; did you mean dpmsolver\+\+ karras\?"):
        resolve_sampler("DPM++ 2M Karas")
    with pytest.raises(InvalidRequest, match="got 'eulr'; did you mean euler"):
        resolve_sampler("eulr")


def test_a_request_keeps_a_samplers_canonical_name_and_its_sigmas_beside_it():
    for sampler, sigmas in (("DPM++ 2M Karras", None), ("dpmsolver++", "karras")):
        request = GenerationRequest("a fox", sampler=sampler, sigmas=sigmas)
        assert (request.sampler, request.sigmas) == ("dpmsolver++", "karras")
    request = GenerationRequest("a fox", sampler="Euler a")
    assert (request.sampler, request.sigmas) == ("euler_ancestral", None)
    with pytest.raises(InvalidRequest, match=r"sigmas must be what the sampler 'DPM\+\+ 2M Karras' says, got 'beta'"):
        GenerationRequest("a fox", sampler="DPM++ 2M Karras", sigmas="beta")


def test_the_names_need_no_arrays():
    program = "import sys, sdtpu_worker.contract.samplers; print({'numpy', 'scipy', 'jax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"
