"""The pictures that the shipped checkpoint was trained on, and the judge that reads them."""

from __future__ import annotations

import random

import pytest
from PIL import Image

from tools.embedded_checkpoint.scenes import SHAPES, Scene, draw_mask, every_scene, judge


def test_the_judge_reads_what_is_drawn():
    rng = random.Random(3)
    scenes = rng.sample(every_scene(), 300)
    wrong = 0
    for scene in scenes:
        seen = judge(scene.draw(rng))
        assert (seen.colour, seen.background) == (scene.colour, scene.background)
        assert seen.agrees_on_size(scene.size)
        assert seen.agrees_on_position(scene.position)
        wrong += seen.shape != scene.shape
    assert wrong <= 3
    assert judge(Image.new("RGB", (64, 64), "red")).shape == "nothing"
    with pytest.raises(ValueError, match="shape must be one of circle, square"):
        draw_mask("hexagon", 32, 32, 10)


def test_captions_are_grammatical_and_one_combination_in_six_is_held_out():
    scene = Scene("orange", "ring", "yellow", "large", "left")
    assert scene.caption() == "a large orange ring on the left of a yellow background"
    assert Scene("orange", "star", "orange").caption() == "an orange star on an orange background"
    scenes = every_scene()
    assert len(scenes) == 8 * 6 * 7 * 15
    assert 1 / 8 < sum(scene.held_out for scene in scenes) / len(scenes) < 1 / 5
    assert {scene.shape for scene in scenes if scene.held_out} == set(SHAPES)
