"""The scenes that the shipped checkpoint knows, their captions, and a judge that reads them from pixels.

A scene is one coloured shape on a plain background, 64 x 64 pixels. The caption grammar is

    a [small|large] COLOUR SHAPE on a COLOUR background
    a [small|large] COLOUR SHAPE (on the left|on the right|at the top|at the bottom) of a COLOUR background

What a caption does not say (the exact size and place) is random, so two seeds give two pictures. This module needs only
Pillow and NumPy; the training scripts draw with it, and the scoring script judges with it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

IMAGE_SIZE = 64
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "green": (30, 160, 60),
    "blue": (35, 75, 220),
    "yellow": (250, 220, 40),
    "orange": (250, 130, 20),
    "purple": (130, 40, 170),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "heart")
SIZES = ("small", None, "large")
POSITIONS = ("left", "right", "top", "bottom", None)
RADIUS_RANGES: dict[str | None, tuple[float, float]] = {"small": (9.5, 11.5), None: (14.0, 16.5), "large": (19.5, 22.0)}

STROKES: dict[str, float] = {"circle": 4.0, "square": 4.0, "triangle": 4.0, "star": 3.0, "heart": 4.0}
"""Pixels that an outline is wide; a ring, which is hollow as it is, has none."""

_SUPERSAMPLING = 4
_DIRECTIONS = 32
_HELD_OUT_SHARE = 6  # one combination of colour, shape and background in six is never trained on


@dataclass(frozen=True)
class Scene:
    """What a caption says; a size or a position that it does not say is None."""

    colour: str
    shape: str
    background: str
    size: str | None = None
    position: str | None = None

    def caption(self) -> str:
        """Return the canonical caption."""
        return self._phrase(self.size, "on the" if self.position in ("left", "right") else "at the")

    def varied_caption(self, rng: random.Random) -> str:
        """Return the caption in a random one of the wordings that the model is trained on."""
        size = rng.choice(("large", "large", "big")) if self.size == "large" else self.size
        preposition = "on the" if self.position in ("left", "right") else rng.choice(("at the", "at the", "on the"))
        words = self._phrase(size, preposition)
        roll = rng.random()
        if self.position and roll < 0.2:
            words = words.replace(f"{self.position} of", f"{self.position} on")
        if roll > 0.9:
            words = words.removesuffix(" background")
        return words.split(" ", 1)[1] if rng.random() < 0.1 else words

    def _phrase(self, size: str | None, preposition: str) -> str:
        noun = " ".join(word for word in (size, self.colour, self.shape) if word)
        place = f"{preposition} {self.position} of" if self.position else "on"
        return f"{_article(noun)} {noun} {place} {_article(self.background)} {self.background} background"

    @property
    def held_out(self) -> bool:
        """Whether this combination of colour, shape and background is kept out of the training set."""
        name = f"{self.colour} {self.shape} {self.background}"
        return hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT_SHARE == 0

    def draw(self, rng: random.Random, *, outlined: bool = False) -> Image.Image:
        """Return one picture of the scene (64 x 64, RGB); `rng` chooses the exact size and place.

        Args:
            rng: the same one gives the same size and place, outlined or not.
            outlined: only the border of the shape has its colour.
        """
        radius = rng.uniform(*RADIUS_RANGES[self.size])
        wander = 3.0 if self.size == "large" else 5.0
        x, y = (IMAGE_SIZE / 2 + rng.uniform(-wander, wander) for _ in range(2))
        near = radius + 1 + rng.uniform(0, 2.5)
        if self.position in ("left", "right"):
            x = near if self.position == "left" else IMAGE_SIZE - near
        elif self.position in ("top", "bottom"):
            y = near if self.position == "top" else IMAGE_SIZE - near
        mask = draw_mask(self.shape, x, y, radius, stroke=STROKES.get(self.shape) if outlined else None)
        canvas = Image.new("RGB", mask.size, COLOURS[self.background])
        canvas.paste(COLOURS[self.colour], mask=mask)
        return canvas


def every_scene() -> list[Scene]:
    """Return all scenes that the caption grammar has, in a fixed order."""
    return [
        Scene(colour, shape, background, size, position)
        for colour, shape, background in itertools.product(COLOURS, SHAPES, COLOURS)
        if colour != background
        for size, position in itertools.product(SIZES, POSITIONS)
    ]


def draw_mask(
    shape: str, x: float, y: float, radius: float, size: int = IMAGE_SIZE, stroke: float | None = None
) -> Image.Image:
    """Return the shape's coverage (`size` x `size`, mode L), centred at (x, y) pixels.

    Args:
        shape: one of `SHAPES`.
        x: of the centre, in pixels.
        y: of the centre, in pixels.
        radius: in pixels.
        size: of the picture, in pixels.
        stroke: pixels of the border that are covered; None for the whole shape.
    """
    scale = _SUPERSAMPLING
    mask = Image.new("L", (size * scale, size * scale), 0)
    draw = ImageDraw.Draw(mask)

    def points(corners: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [((x + dx * radius) * scale, (y + dy * radius) * scale) for dx, dy in corners]

    if shape in ("circle", "ring"):
        draw.ellipse(points([(-1, -1), (1, 1)]), fill=255)
        if shape == "ring":
            draw.ellipse(points([(-0.55, -0.55), (0.55, 0.55)]), fill=0)
    elif shape == "square":
        draw.rectangle(points([(-0.95, -0.95), (0.95, 0.95)]), fill=255)
    elif shape == "triangle":
        draw.polygon(points([(0, -1), (1, 0.85), (-1, 0.85)]), fill=255)
    elif shape == "star":
        angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
        lengths = [1.05, 0.42] * 5
        corners = [(length * math.cos(a), length * math.sin(a)) for a, length in zip(angles, lengths, strict=True)]
        draw.polygon(points(corners), fill=255)
    elif shape == "heart":
        turns = [2 * math.pi * i / 60 for i in range(60)]
        corners = [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1,
            )
            for t in turns
        ]
        draw.polygon(points(corners), fill=255)
    else:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    if stroke is not None:
        mask.paste(0, mask=_shrink(mask, stroke * scale))
    return mask.reduce(scale)


def _shrink(mask: Image.Image, by: float) -> Image.Image:
    """Return the part of a mask that lies more than `by` pixels from its border."""
    inside = np.asarray(mask)
    left = inside
    for turn in range(_DIRECTIONS):
        angle = 2 * math.pi * turn / _DIRECTIONS
        left = np.minimum(left, np.roll(inside, (round(by * math.sin(angle)), round(by * math.cos(angle))), (0, 1)))
    return Image.fromarray(left)


@dataclass(frozen=True)
class Verdict:
    """What the judge reads in a picture; size and position are measured in pixels."""

    colour: str
    shape: str
    background: str
    radius: float
    x: float
    y: float

    def agrees_on_size(self, size: str | None) -> bool:
        """Whether the measured size is the size that a caption says; a caption without one agrees with any size."""
        if size is None:
            return True
        return self.radius < 12.6 if size == "small" else self.radius > 17.4

    def agrees_on_position(self, position: str | None) -> bool:
        """Whether the measured place is the one that a caption says; a caption without one agrees with any place."""
        if position is None:
            return True
        offset = {"left": -self.x, "right": self.x, "top": -self.y, "bottom": self.y}[position]
        return offset > 4.5


def judge(image: Image.Image) -> Verdict:
    """Return what a picture shows: the nearest colours of the palette, and the shape whose drawing is most like it.

    Args:
        image: any size and mode; it is read at 64 x 64 RGB.

    Returns:
        The most likely scene. `x` and `y` are the offset of the bounding box from the centre.
    """
    pixels = np.asarray(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE)), np.float32)
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3),
                            pixels[:, -2:].reshape(-1, 3)])  # fmt: skip
    background_rgb = np.median(frame, axis=0)
    distance = np.linalg.norm(pixels - background_rgb, axis=-1)
    core = distance >= np.quantile(distance, 0.99)
    object_rgb = np.median(pixels[core], axis=0)
    axis = object_rgb - background_rgb
    coverage = np.clip(((pixels - background_rgb) @ axis) / max(float(axis @ axis), 1.0), 0, 1)
    colour, background = nearest_colour(object_rgb), nearest_colour(background_rgb)
    mask = coverage > 0.5
    rows, columns = np.flatnonzero(mask.sum(1) > 1), np.flatnonzero(mask.sum(0) > 1)
    if float(axis @ axis) < 1000 or not len(rows) or not len(columns):
        return Verdict(colour, "nothing", background, 0.0, 0.0, 0.0)
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    return Verdict(
        colour=colour,
        shape=_best_shape(coverage),
        background=background,
        radius=float(max(bottom - top, right - left)) / 2,
        x=float(left + right - IMAGE_SIZE) / 2,
        y=float(top + bottom - IMAGE_SIZE) / 2,
    )


def _best_shape(coverage: np.ndarray) -> str:
    """Return the shape whose drawing, of the same area and about as soft, differs least from the coverage."""
    coverage = np.where(coverage < 0.1, 0, coverage)  # ripples of the background are not part of the object
    area, grid = coverage.sum(), np.arange(IMAGE_SIZE) + 0.5
    x, y = float((coverage.sum(0) * grid).sum() / area), float((coverage.sum(1) * grid).sum() / area)
    errors = {}
    for shape, (unit_area, dx, dy) in _moments().items():
        for scale in (0.9, 1.0, 1.1):
            radius = scale * math.sqrt(area / unit_area)
            drawn = draw_mask(shape, x - dx * radius, y - dy * radius, radius)
            for softness in (0.0, 1.0, 2.0):
                template = np.asarray(drawn.filter(ImageFilter.GaussianBlur(softness)), np.float32) / 255
                errors[shape, scale, softness] = float(((coverage - template) ** 2).sum())
    return min(errors, key=lambda key: errors[key])[0]


@functools.cache
def _moments() -> dict[str, tuple[float, float, float]]:
    """Return each shape's area and centre of mass at radius 1, measured on a large drawing."""
    found = {}
    grid = (np.arange(128) + 0.5 - 64) / 50
    for shape in SHAPES:
        mask = np.asarray(draw_mask(shape, 64, 64, 50, size=128), np.float32) / 255
        found[shape] = (
            float(mask.sum()) / 50**2,
            float((mask.sum(0) * grid).sum() / mask.sum()),
            float((mask.sum(1) * grid).sum() / mask.sum()),
        )
    return found


def nearest_colour(rgb: np.ndarray) -> str:
    """Return the colour of the palette that is most like `rgb`, three numbers from 0 to 255."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(rgb - np.array(COLOURS[name]))))


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"
