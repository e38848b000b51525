"""Jobs with pictures, on a real worker with the shipped checkpoint: image to image, masks, chains, foreign clients."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from celery import chain, group
from PIL import Image, ImageDraw

from sdtpu_worker import InvalidRequest, generate, generate_many, open_image
from tests.support.paths import ROOT, XLA_CACHE
from tests.worker.workers import start_worker
from tools.embedded_checkpoint.scenes import judge
from tools.embedded_checkpoint.score_outline import judge_outline

pytestmark = [pytest.mark.slow]
RED, BLUE = "a red circle on a white background", "a blue circle on a white background"


@pytest.fixture(scope="module")
def worker(redis_url, tmp_path_factory):
    with start_worker(redis_url, tmp_path_factory.mktemp("pictures"), SDTPU_CPU_DEVICES="4") as started:
        yield started


def circle(colour: str, left: int = 16, right: int = 48) -> Image.Image:
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((left, 16, right, 48), fill=colour)
    return picture


def encoded(picture: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def distance(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())


def test_a_red_circle_becomes_a_blue_one_at_the_same_place(app, worker):
    left, more = " circle on the left of a white background", {"num_inference_steps": 30}
    red = generate.delay(f"a red{left}", seed=0, **more).get(timeout=60)
    before = open_image(red)
    result = generate.delay(f"a blue{left}", image=red["image"]["uri"], strength=0.4, seed=10, **more).get(timeout=60)
    after, elsewhere = open_image(result), open_image(generate.delay(f"a blue{left}", seed=10, **more).get(timeout=60))
    seen, was = judge(after), judge(before)
    assert (seen.colour, seen.shape, seen.background) == ("blue", "circle", "white")
    assert was.colour == "red"

    def where(picture: Image.Image) -> np.ndarray:
        return np.asarray(picture, int).min(-1) < 128  # not white

    def overlap(a: np.ndarray, b: np.ndarray) -> float:
        return float((a & b).sum() / (a | b).sum())

    assert overlap(where(before), where(after)) > 0.85 > 0.75 > overlap(where(before), where(elsewhere))
    assert result["options"] == {"image": red["image"]["uri"], "strength": 0.4}
    assert json.loads(json.dumps(result)) == result


def test_a_picture_may_be_bytes_a_pil_image_a_path_a_data_uri_or_a_result(app, worker, tmp_path):
    picture = circle("red")
    path = tmp_path / "circle.png"
    path.write_bytes(encoded(picture))
    uri = f"data:image/png;base64,{base64.b64encode(encoded(picture)).decode()}"
    jobs = [
        generate.delay(BLUE, image=given, seed=1, strength=0.6) for given in (path.read_bytes(), picture, path, uri)
    ]
    results = [job.get(timeout=60) for job in jobs]
    pictures = [open_image(result).tobytes() for result in results]
    assert len(set(pictures)) == 1
    stored = [result["options"]["image"] for result in results]
    assert stored[0] == stored[2] == stored[3], "the same bytes are stored once"
    assert all(uri.startswith("redis:sdtpu:image:_picture-") for uri in stored)
    again = generate.delay(BLUE, image=results[0], seed=1, strength=0.6, num_inference_steps=10)
    assert again.get(timeout=60)["options"]["image"] == results[0]["image"]["uri"]


def test_in_a_chain_the_earlier_image_is_the_picture(app, worker):
    job = chain(generate.s(RED, seed=3), generate.s(prompt=BLUE, strength=0.8, seed=4)).apply_async()
    result = job.get(timeout=60)
    first = job.parent.get(timeout=60)
    assert result["options"]["image"] == first["image"]["uri"]
    direct = generate.delay(BLUE, image=first, strength=0.8, seed=4).get(timeout=60)
    assert open_image(result).tobytes() == open_image(direct).tobytes()
    both = group(
        generate.s(BLUE, image=circle("green"), seed=1), generate.s(BLUE, image=circle("red"), seed=1)
    ).apply_async()
    assert len({open_image(each).tobytes() for each in both.get(timeout=60)}) == 2


def test_each_of_many_pictures_is_that_of_the_single_job(app, worker):
    results = generate_many(BLUE, 3, seed=5, image=circle("red"), strength=0.5, num_inference_steps=10).get(timeout=60)
    single = generate.delay(BLUE, seed=6, image=circle("red"), strength=0.5, num_inference_steps=10).get(timeout=60)
    assert [result["seed"] for result in results] == [5, 6, 7]
    assert open_image(results[1]).tobytes() == open_image(single).tobytes()
    assert len({open_image(result).tobytes() for result in results}) == 3


def test_what_the_mask_leaves_alone_has_the_pictures_own_pixels(app, worker):
    picture = circle("red", 4, 28)
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((34, 8, 63, 55), fill=255)
    result = generate.delay(
        "a blue star on the right of a white background", image=picture, mask_image=mask, seed=2
    ).get(timeout=60)
    after, before = np.asarray(open_image(result)), np.asarray(picture)
    drawn = np.asarray(mask) >= 128
    np.testing.assert_array_equal(after[~drawn], before[~drawn])
    assert np.abs(after[drawn].astype(int) - before[drawn]).mean() > 5


def test_jpeg_and_webp_with_orientation_and_transparency(app, worker):
    turned = circle("red", 4, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees to see it
    buffer = io.BytesIO()
    turned.rotate(90).save(buffer, "jpeg", exif=exif, quality=95)
    from_jpeg = generate.delay(RED, image=buffer.getvalue(), strength=0.1, seed=1, num_inference_steps=10)
    plain = generate.delay(RED, image=turned, strength=0.1, seed=1, num_inference_steps=10)
    a, b = (open_image(job.get(timeout=60)) for job in (from_jpeg, plain))
    assert distance(a, b) < 6
    holes = circle("red").convert("RGBA")
    holes.putalpha(Image.fromarray((np.asarray(circle("red").convert("L")) < 200).astype(np.uint8) * 255))
    see = generate.delay(RED, image=encoded(holes, "webp"), strength=0.1, seed=1, num_inference_steps=10)
    assert judge(open_image(see.get(timeout=60))).background == "white"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"image": "file:///etc/passwd"}, "image must be in a store of this worker .*opens nothing else, got"),
        ({"image": "http://127.0.0.1:9/x.png"}, "image must be in a store of this worker"),
        ({"image": "redis:sdtpu:dead"}, "image must be in a store of this worker"),
        ({"image": "redis:sdtpu:image:../x"}, "image must be a stored picture, got .* which expired"),
        ({"image": "redis:sdtpu:image:_picture-0"}, "image must be a stored picture, got .* which expired"),
        ({"image": "simplecache::file:///etc/hosts"}, "image must be in a store of this worker"),
    ],
)
def test_a_worker_opens_nothing_but_its_stores(app, worker, given, text):
    with pytest.raises(InvalidRequest, match=text):
        generate.delay(RED, **given).get(timeout=60)


def test_a_picture_that_is_none_fails_its_own_job_alone(app, worker):
    """A foreign client has no checks of ours: the worker makes them."""
    beside = [generate.delay(RED, seed=i) for i in range(4)]

    def send(**kwargs) -> str:
        sent = app.send_task("sdtpu.generate", args=["a star"], kwargs=kwargs, queue="sdtpu")
        with pytest.raises(InvalidRequest) as caught:
            sent.get(timeout=60)
        return str(caught.value)

    def data_uri(data: bytes, kind: str = "png") -> str:
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

    whole = encoded(circle("red"))
    animated = io.BytesIO()
    circle("red").save(animated, "webp", save_all=True, append_images=[circle("blue")])
    bomb = encoded(Image.new("1", (6_000, 6_000)))
    assert "cannot be decoded to the end" in send(image=data_uri(whole[:80]))
    assert "bytes of something else" in send(image=data_uri(b"%!PS-Adobe-3.0 EPSF-3.0"))
    assert "got an animation of 2 frames" in send(image=data_uri(animated.getvalue(), "webp"))
    assert "at most 4,096 pixels a side, got 6,000 x 6,000" in send(image=data_uri(bomb))
    assert "height x width must be one of 64x64" in send(image=data_uri(encoded(circle("red").resize((32, 32)))))
    mask = data_uri(encoded(Image.new("L", (32, 32))))
    assert "mask_image must have the size of the result, 64x64" in send(image=data_uri(whole), mask_image=mask)
    assert "mask_image must come with an image" in send(mask_image=mask)
    assert "data URI of another kind" in send(image="data:text/html;base64,PGI+")
    assert "strength must be a number from 0 to 1" in send(image=data_uri(whole), strength=2)
    assert [job.get(timeout=60)["seed"] for job in beside] == [0, 1, 2, 3]
    sent = app.send_task("sdtpu.generate", args=[BLUE], kwargs={"image": data_uri(whole), "seed": 1}, queue="sdtpu")
    result = sent.get(timeout=60)
    assert result["options"]["image"].startswith("data:image/png;base64;sha256=")
    assert len(json.dumps(result)) < 2000


def test_an_image_store_in_files_serves_pictures_too_and_no_link_leads_out_of_it(app, redis_url, tmp_path, monkeypatch):
    images = tmp_path / "images"
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(circle("black")))
    monkeypatch.setitem(app.conf, "sdtpu_image_store", f"file://{images}")
    settings = {"SDTPU_IMAGE_STORE": f"file://{images}", "SDTPU_QUEUE": "files", "SDTPU_CPU_DEVICES": "2"}
    with start_worker(redis_url, tmp_path, "-Q", "files", **settings):
        result = generate.apply_async([BLUE], {"image": circle("red"), "seed": 1}, queue="files").get(timeout=90)
        named = Path(result["options"]["image"].removeprefix("file://"))
        assert named.parent == images
        assert named.read_bytes()
        assert not list(images.glob(".*"))
        (images / "link.png").symlink_to(secret)
        for name, text in (
            ("link.png", "symbolic link is not followed"),
            ("../secret.png", "must be in a store of this worker"),
            ("sub/secret.png", "must be in a store of this worker"),
            ("gone.png", "which expired"),
        ):
            with pytest.raises(Exception, match=text):
                generate.apply_async([BLUE], {"image": f"file://{images}/{name}"}, queue="files").get(timeout=60)


def test_the_example_makes_its_pictures(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "pictures.py"), "--out", str(tmp_path)]
    env = {**os.environ, "SDTPU_COMPILE_CACHE": XLA_CACHE}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    red, blue, heart, outline = (Image.open(tmp_path / f"{name}.png") for name in ("red", "blue", "heart", "outline"))
    assert (judge(red).colour, judge(blue).colour) == ("red", "blue")
    right = (42, 0, 64, 64)
    assert np.array_equal(np.asarray(heart.crop(right)), np.asarray(blue.crop(right))), "the mask leaves it alone"
    assert (judge(heart).colour, judge(heart).shape) == ("green", "heart")
    assert not judge_outline(red).is_outlined
    seen = judge_outline(outline)
    assert (seen.is_outlined, seen.border, seen.background) == (True, "red", "white")
    assert Image.open(tmp_path / "grid.png").size == (320, 64)
