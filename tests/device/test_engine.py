"""The engine on eight simulated devices: same pixels whatever the company, parity with diffusers, no recompiles."""

from __future__ import annotations

import dataclasses
import gc
import random
import time
import weakref
from collections import Counter
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdtpu_worker.aggregator.costs import Cost, TickCosts
from sdtpu_worker.aggregator.jobs import Terms
from sdtpu_worker.aggregator.plan import Phase, Place, Plan
from sdtpu_worker.aggregator.policy import Aggregator
from sdtpu_worker.contract.request import GenerationRequest
from sdtpu_worker.device_loop.loop import DeviceLoop
from sdtpu_worker.device_loop.submission import JobHandedOver
from sdtpu_worker.diffusion.calibration import calibrate
from sdtpu_worker.diffusion.checkpoint import load_checkpoint
from sdtpu_worker.diffusion.engine import Engine
from sdtpu_worker.diffusion.engine_io import DecodedImage
from sdtpu_worker.diffusion.reference_image import agree
from sdtpu_worker.diffusion.samplers import COLUMNS
from sdtpu_worker.diffusion.start import make_warm_engine
from sdtpu_worker.errors import ConfigurationError, EngineUnavailable, InvalidRequest
from tests.support.checkpoints import make_random_checkpoint
from tests.support.engines import generate_all, on_one_device, run_alone
from tests.support.waiting import wait_until

PROMPTS = (
    "a red circle on a blue background",
    "a small yellow star on a black background",
    "a white heart on the left of a green background",
    "a large purple ring on an orange background",
    "a blue square on a white background",
    "a black triangle at the top of a red background",
    "an orange star on a purple background",
    "a green circle on a yellow background",
)
SAMPLERS = ("pndm", "ddim", "euler", "dpmsolver++", "euler_ancestral", "heun", "unipc", "sde-dpmsolver++", "lcm")


def mixed_requests(count: int, seed: int) -> list[GenerationRequest]:
    rng = random.Random(seed)
    return [
        GenerationRequest(
            rng.choice(PROMPTS),
            negative_prompt=rng.choice(("", "a red square")),
            seed=rng.randrange(2**63),
            num_inference_steps=rng.randint(1, 12),
            guidance_scale=rng.choice((1.0, 4.0, 7.5)),
            sampler=rng.choice(SAMPLERS),
        )
        for _ in range(count)
    ]


@pytest.fixture(
    scope="module",
    params=[(1, "float32", False), (3, "float32", False), (2, "bfloat16", False), (2, "float32", True)],
    ids=lambda p: f"{p[0]}x{p[1]}{'-xl' if p[2] else ''}",
)
def any_engine(request, random_checkpoint, random_xl_checkpoint, devices, compile_cache):
    slots, dtype, is_xl = request.param
    checkpoint = load_checkpoint(str(random_xl_checkpoint if is_xl else random_checkpoint), getattr(jnp, dtype))
    return make_warm_engine(checkpoint, devices, slots, None, compile_cache)


def test_the_same_request_gives_the_same_pixels_on_every_device_and_slot_with_any_neighbours(any_engine):
    wanted = GenerationRequest("a red circle", seed=2**40 + 7, num_inference_steps=9, sampler="dpmsolver++")
    job = any_engine.prepare("it", wanted)
    generate_all(any_engine, mixed_requests(any_engine.info.num_slots, 1))  # leaves strangers' state in every slot
    rng = random.Random(0)
    reference = run_alone(any_engine, job, 0, 0, [9]).pixels
    assert reference.std() > 0
    for portions in ([1] * 9, [4, 5], [2, 3, 20]):
        device, slot = rng.randrange(any_engine.info.num_devices), rng.randrange(any_engine.info.slots_per_device)
        np.testing.assert_array_equal(run_alone(any_engine, job, device, slot, portions).pixels, reference)
    places = set()
    for trial in range(4):
        crowd = mixed_requests(20, trial)
        position = rng.randrange(20)
        image = generate_all(any_engine, [*crowd[:position], wanted, *crowd[position:]], trial + 1)[position]
        places.add((image.device, image.slot))
        np.testing.assert_array_equal(image.pixels, reference)
    assert len(places) > 1


def test_five_hundred_mixed_jobs_trace_and_compile_nothing(any_engine):
    before = any_engine.traces_since_ready
    lane, jobs = any_engine.info.resolutions[0], mixed_requests(500, 5)
    policy = Aggregator(
        any_engine.costs, any_engine.info.slots_per_device, any_engine.info.phases_per_tick, tick_s=0.02
    )
    loop = DeviceLoop(any_engine, policy)
    loop.start()
    submissions = [
        loop.submit(any_engine.prepare(str(i), request), Terms(priority=9 - i // 60)) for i, request in enumerate(jobs)
    ]
    for submission in submissions:
        assert submission.future.result(120).pixels.shape == (*lane, 3)
    loop.close()
    assert any_engine.traces_since_ready == before
    assert loop.stats.preemptions > 0


def test_a_trace_would_be_counted(any_engine):
    before = any_engine.traces_since_ready
    jax.jit(lambda x: x + before)(1)
    assert any_engine.traces_since_ready > before


def test_an_engine_that_is_closed_or_forgotten_leaves_no_listener_behind(random_checkpoint, devices):
    checkpoint = load_checkpoint(str(random_checkpoint))
    closed, forgotten = (Engine(checkpoint, devices[:1]) for _ in range(2))
    listeners = [weakref.ref(engine._traces) for engine in (closed, forgotten)]
    closed.close()
    closed.close()
    before = closed.traces_since_ready
    jax.jit(lambda x: x + before)(1)
    assert closed.traces_since_ready == before
    del closed, forgotten
    gc.collect()
    assert [listener() for listener in listeners] == [None, None]


def test_an_engine_that_is_not_calibrated_draws_images_and_says_what_it_lacks(random_checkpoint, devices):
    engine = Engine(load_checkpoint(str(random_checkpoint)), devices[:2])
    (image,) = generate_all(engine, mixed_requests(1, 3))
    assert image.finite
    with pytest.raises(RuntimeError, match=r"not calibrated: .*make_warm_engine"):
        _ = engine.costs


def test_a_calibration_has_the_costs_the_reference_image_and_the_colours_of_every_lane(random_checkpoint, devices):
    lanes = ((8, 8), (8, 16))
    engine = Engine(load_checkpoint(str(random_checkpoint)), devices[:2], 1, lanes, with_previews=True)
    calibration = calibrate(engine)
    assert engine.traces_since_ready == 0, "nothing compiles but the programs of the engine"
    for lane in lanes:
        costs = calibration.costs[lane]
        assert costs.num_devices == 2
        assert min(costs.cost.step_s, costs.cost.insert_s, costs.cost.decode_s) > 0
        assert calibration.reference_images[lane].shape == (*lane, 3)
        assert calibration.preview_colours[lane].shape == (5, 3)
    assert np.asarray(engine._slots[lanes[0]].num_steps).any()
    engine.adopt(calibration)
    assert engine.costs is calibration.costs
    assert not np.asarray(engine._slots[lanes[0]].num_steps).any(), "the slots of a ready engine are empty"


def test_one_trace_makes_each_program(random_checkpoint, devices):
    traces: Counter[str] = Counter()

    def count(event: str, _: float, **options: object) -> None:
        if event.endswith("jaxpr_trace_duration"):
            traces[str(options.get("fun_name"))] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        engine = Engine(load_checkpoint(str(random_checkpoint)), devices[:2], 1, ((8, 8), (8, 16)))
        generate_all(engine, mixed_requests(5, 0))
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert traces["local_tick"] == traces["local_snapshot"] == traces["local_restore"] == 2


def test_several_resolutions_are_served_by_programs_of_their_own(random_checkpoint, devices):
    engine = Engine(load_checkpoint(str(random_checkpoint)), devices[:2], 1, ((8, 8), (8, 16)))
    requests = [
        GenerationRequest("a", seed=i, num_inference_steps=2, height=8, width=width)
        for i, width in enumerate((8, 16, 16, 8, 16))
    ]
    images = generate_all(engine, requests)
    assert [image.pixels.shape for image in images] == [(8, request.width, 3) for request in requests]
    with pytest.raises(InvalidRequest, match=r"height x width must be one of 8x8, 8x16 .*got 64x64"):
        engine.prepare("x", GenerationRequest("a", seed=0, height=64, width=64))


def test_a_configured_size_that_the_model_cannot_make_is_refused(random_checkpoint, devices):
    with pytest.raises(ConfigurationError, match="sdtpu_resolutions must be multiples of 4"):
        Engine(load_checkpoint(str(random_checkpoint)), devices[:1], 1, ((8, 10),))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_guidance_scale_of_one_or_less_draws_the_prompt_alone_as_diffusers_does(engine, sampler):
    """A scale of 0 drew the negative prompt: two prompts gave one picture."""

    def draw(prompt: str, negative_prompt: str, scale: float) -> GenerationRequest:
        return GenerationRequest(
            prompt, negative_prompt, seed=3, num_inference_steps=4, guidance_scale=scale, sampler=sampler
        )

    scales = (1.0, 0.0, 0.5, -3.0)
    images = generate_all(
        engine,
        [
            draw(PROMPTS[1], "", 1.5),  # beside guided jobs, and on any device
            *(draw(PROMPTS[0], negative, scale) for scale in scales for negative in ("", PROMPTS[2])),
            *(draw(PROMPTS[1], negative, scale) for scale, negative in ((0.0, PROMPTS[2]), (1.5, PROMPTS[2]))),
        ],
    )
    guided, *unguided, other, otherwise_guided = (image.pixels for image in images)
    for pixels in unguided:
        np.testing.assert_array_equal(pixels, unguided[0])
    assert np.abs(unguided[0].astype(int) - other).max() > 50, "another prompt is another picture"
    assert np.abs(guided.astype(int) - otherwise_guided).max() > 0, "above 1 the negative prompt counts"


def test_the_key_words_of_a_seed_are_jaxs_own_and_every_bit_counts(engine):
    def words(seed):
        return engine.prepare("x", GenerationRequest("a", seed=seed)).key_data

    np.testing.assert_array_equal(words(7), jax.random.key_data(jax.random.key(7)))
    np.testing.assert_array_equal(words(2**32 - 1), jax.random.key_data(jax.random.PRNGKey(2**32 - 1)))
    assert len({tuple(words(seed)) for seed in (5, 2**32 + 5, 2**62 + 5)}) == 3


def test_prompts_of_more_than_77_tokens_are_cut_and_reported(engine):
    tokenizer = engine.checkpoint.family.tokenizer
    ids, truncated = tokenizer.encode(["red " * 75])
    assert (ids.shape, truncated) == ((1, 77), False)
    ids, truncated = tokenizer.encode(["red " * 76])
    assert (ids.shape, truncated) == ((1, 77), True)
    assert engine.prepare("x", GenerationRequest("red " * 200, seed=0)).truncated


def test_values_that_are_not_finite_are_reported_for_their_job_alone(engine):
    requests = [GenerationRequest(prompt, seed=i, num_inference_steps=2) for i, prompt in enumerate(PROMPTS)]
    good = generate_all(engine, requests)
    jobs = {str(i): engine.prepare(str(i), request) for i, request in enumerate(requests)}
    jobs["3"].table[:, COLUMNS.index("a")] = np.nan
    phases = [(Phase(insert=(0, str(i)), steps=2), Phase(decode=(0, str(i)))) for i in range(8)]
    plan = Plan(engine.info.resolutions[0], tuple(phases))
    images = engine.execute(plan, jobs).wait()
    assert [image.finite for image in images] == [i != 3 for i in range(8)]
    for i in (2, 4):
        np.testing.assert_array_equal(images[i].pixels, good[i].pixels)


def test_devices_that_work_recover_with_empty_slots_and_compile_nothing(engine):
    request = GenerationRequest(PROMPTS[0], seed=1, num_inference_steps=3)
    job = engine.prepare("it", request)
    (before,) = generate_all(engine, [request])
    engine.execute(on_one_device(engine, job.lane, 5, Phase(insert=(0, "it"), steps=2)), {"it": job})
    traces = engine.traces_since_ready
    for leaf in jax.tree.leaves(engine._slots[job.lane]):
        leaf.delete()  # as a program that failed takes them with it
    with pytest.raises(RuntimeError, match="deleted"):
        engine.execute(on_one_device(engine, job.lane, 5, Phase(steps=1)), {})
    engine.recover()
    assert engine.traces_since_ready == traces
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(engine._slots[job.lane]))
    (after,) = generate_all(engine, [request])
    np.testing.assert_array_equal(after.pixels, before.pixels)


def break_device(engine: Engine, device: int) -> Any:
    """Return the engine's parameters with NaN everywhere on one device, as a chip with a broken memory reads them."""

    def broken(leaf: jax.Array) -> jax.Array:
        shards = [shard.data * np.nan if i == device else shard.data for i, shard in enumerate(leaf.addressable_shards)]
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

    return {**engine.params, "unet": jax.tree.map(broken, engine.params["unet"])}


def test_devices_that_draw_something_else_than_at_the_start_are_lost_and_all_of_them_are_an_error(engine, monkeypatch):
    """One device that differed ended the worker with all its devices."""
    assert (engine.recover(), engine.lost_devices) == (frozenset(), frozenset())
    lane = engine.info.resolutions[0]
    images = engine.calibration.reference_images
    with monkeypatch.context() as patch:
        patch.setattr(engine, "params", break_device(engine, 5))
        assert engine.recover() == engine.check_devices([2]) == {5}
        assert engine.check_devices([5]) == frozenset()
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(engine._slots[lane]))
    monkeypatch.setitem(images, lane, 255 - images[lane])
    with pytest.raises(EngineUnavailable, match="no device draws the reference image"):
        engine.recover()


def test_a_device_whose_programs_fail_is_told_from_those_that_work(engine, monkeypatch):
    execute, broken = engine.execute, {6}

    def fail(plan, jobs, snapshots=None):
        tick = execute(plan, jobs, snapshots)
        if any(plan.devices[device] for device in broken):
            raise jax.errors.JaxRuntimeError("INTERNAL: a device does not do its work")
        return tick

    monkeypatch.setattr(engine, "execute", fail)
    assert engine.recover() == {6}
    broken.update(range(8))
    with pytest.raises(jax.errors.JaxRuntimeError, match="does not do its work"):
        engine.recover()


@pytest.mark.parametrize("sick", [0, 5])
def test_a_device_that_breaks_while_it_serves_costs_no_image_and_no_other_device(engine, monkeypatch, sick):
    """The second try, alone, was always on device 0."""
    requests = [GenerationRequest(prompt, seed=i, num_inference_steps=4) for i, prompt in enumerate(PROMPTS * 2)]
    wanted = [image.pixels for image in generate_all(engine, requests)]
    monkeypatch.setattr(engine, "params", break_device(engine, sick))
    traces = engine.traces_since_ready
    loop = DeviceLoop(engine, Aggregator(engine.costs, 1, engine.info.phases_per_tick, tick_s=0.05))
    loop.start()
    submissions = [loop.submit(engine.prepare(str(i), request)) for i, request in enumerate(requests)]
    for submission, pixels in zip(submissions, wanted, strict=True):
        np.testing.assert_array_equal(submission.future.result(120).pixels, pixels)
    assert loop.stats.lost_devices == [sick]
    loop.close()
    assert engine.traces_since_ready == traces


def test_the_image_that_most_devices_draw_is_the_reference_image():
    """What device 0 drew was the measure for all, so a device 0 that was sick at the start condemned all others."""

    def images(*values: int, broken: Collection[int] = ()) -> dict[int, DecodedImage]:
        pixels = [np.full((2, 2, 3), value, np.uint8) for value in values]
        return {d: DecodedImage("it", d, 0, drawn, d not in broken) for d, drawn in enumerate(pixels)}

    for drawn, value, lost in (
        (images(7, 7, 7), 7, set()),
        (images(0, 7, 7), 7, {0}),
        (images(7, 7, 0, 7, 5), 7, {2, 4}),
        (images(0, 7, broken=[0]), 7, {0}),
        (images(7, 7, 7, broken=[1]), 7, {1}),
        (images(3, 7), 3, {1}),
        (images(3), 3, set()),
    ):
        pixels, differing = agree(drawn)
        assert (pixels == value).all()
        assert differing == lost


def test_a_device_that_is_sick_at_the_start_is_lost_from_the_start(random_checkpoint, devices, compile_cache):
    engine = Engine(load_checkpoint(str(random_checkpoint)), devices, 1, None, compile_cache)
    healthy, engine.params = engine.params, break_device(engine, 0)
    engine.adopt(calibrate(engine))
    assert engine.lost_devices == {0}
    engine.params = healthy
    assert engine.recover() == frozenset()


@pytest.mark.parametrize(
    ("exc", "fatal"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Error allocating device buffer: 2.00G"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: Core halted unexpectedly: INTERNAL: Accelerator device halted"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: the connection to the runtime was closed"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access"), True),
        (MemoryError("out of memory"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: during context [post-optimization]: something else"), False),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: buffer 3 has another shape"), False),
        (RuntimeError("Array has been deleted with shape=float32[8,4,8,8]."), False),
        (ValueError("the prompt says that all work is halted"), False),
    ],
)
def test_lost_devices_and_memory_that_is_full_are_told_from_what_another_try_may_mend(engine, exc, fatal):
    assert engine.is_fatal(exc) is fatal


@pytest.mark.parametrize("any_engine", [(3, "float32", False), (2, "bfloat16", False)], indirect=True, ids=["3", "2"])
def test_a_loop_that_drains_brings_the_state_of_every_slot_bit_for_bit(any_engine, monkeypatch):
    costs = {lane: TickCosts(any_engine.info.num_devices, Cost(0.01)) for lane in any_engine.info.resolutions}
    requests = [
        dataclasses.replace(request, num_inference_steps=40)
        for request in mixed_requests(any_engine.info.num_slots + 3, 7)
    ]
    wanted = generate_all(any_engine, requests)

    def run(snapshots=None) -> tuple[list, DeviceLoop]:
        policy = Aggregator(costs, any_engine.info.slots_per_device, any_engine.info.phases_per_tick, tick_s=0.02)
        loop = DeviceLoop(any_engine, policy)
        loop.start()
        jobs = [any_engine.prepare(str(i), request) for i, request in enumerate(requests)]
        snapshots = snapshots or [None] * len(jobs)
        return [loop.submit(job, snapshot=state) for job, state in zip(jobs, snapshots, strict=True)], loop

    execute = Engine.execute

    def execute_slowly(*args: Any) -> Any:
        time.sleep(0.1)
        return execute(*args)

    with monkeypatch.context() as patch:  # the jobs last while the loop is told to drain
        patch.setattr(Engine, "execute", execute_slowly)
        submissions, loop = run()
        num_slots = any_engine.info.num_slots
        wait_until(lambda: sum(submission.progress.current > 0 for submission in submissions) >= num_slots)
        loop.drain(0)
        ends = [submission.future.exception(120) for submission in submissions]
        steps = loop.stats.job_steps
        loop.close()
    assert all(isinstance(end, JobHandedOver) for end in ends)
    states = [
        end.snapshot and any_engine.read_snapshot(end.snapshot.to_bytes(), submission.job)
        for end, submission in zip(ends, submissions, strict=True)
    ]
    assert sum(state is not None for state in states) == any_engine.info.num_slots
    any_engine.recover()
    submissions, loop = run(states)
    for submission, image in zip(submissions, wanted, strict=True):
        np.testing.assert_array_equal(submission.future.result(120).pixels, image.pixels)
    loop.close()
    total = sum(submission.job.num_steps for submission in submissions)
    assert steps + loop.stats.job_steps == total, "no step was lost or repeated"


def test_a_safety_checker_in_the_checkpoint_is_run_and_one_that_is_not_gives_none(engine, devices, tmp_path):
    assert engine.check_safety(np.zeros((64, 64, 3), np.uint8)) is None
    folder = make_random_checkpoint(tmp_path / "checkpoint", safety_checker=True)
    checkpoint = load_checkpoint(str(folder))
    assert Engine(checkpoint, devices[:2]).check_safety(np.zeros((8, 8, 3), np.uint8)) in (True, False)
    weights: Any = checkpoint.safety_checker.params
    verdicts = []
    for threshold in (2.0, -2.0):
        weights["concept_embeds_weights"] = np.full(17, threshold, np.float32)
        weights["special_care_embeds_weights"] = np.full(3, threshold, np.float32)
        verdicts.append(Engine(checkpoint, devices[:2]).check_safety(np.full((8, 8, 3), 99, np.uint8)))
    assert verdicts == [False, True]


def test_a_preview_shows_the_picture_of_a_slot_and_changes_no_pixel(engine, shipped, devices, compile_cache):
    previewing = make_warm_engine(shipped, devices, 1, None, compile_cache, with_previews=True)
    lane = previewing.info.resolutions[0]
    for sampler in ("ddim", "euler"):
        request = GenerationRequest(
            "a red circle on a blue background", seed=1, num_inference_steps=20, sampler=sampler
        )  # fmt: skip
        job = previewing.prepare("a", request)
        previewing.execute(on_one_device(previewing, lane, 3, Phase(insert=(0, "a"), steps=19)), {"a": job})
        plan = on_one_device(previewing, lane, 3, Phase(steps=1))
        tick = previewing.execute(dataclasses.replace(plan, previews=(Place("a", 3, 0),)), {})
        assert tick.wait() == []
        (image,) = previewing.execute(on_one_device(previewing, lane, 3, Phase(decode=(0, "a"))), {}).wait()
        blocks = image.pixels.reshape(8, 8, 8, 8, 3).mean((1, 3))
        assert tick.previews["a"].shape == (8, 8, 3)
        assert np.abs(tick.previews["a"] - blocks).mean() < 40, "as good as a linear map gets"
        np.testing.assert_array_equal(image.pixels, run_alone(engine, job, 0, 0, [20]).pixels)
