"""Everything that a client can send and should not: each fails its own job with one clear error, and no other job."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors.numpy import load_file, save_file

from sdtpu_worker import InvalidRequest, generate, open_image
from sdtpu_worker.images.pictures import MAX_PICTURE_BYTES
from tests.worker.test_loras import write_lora
from tests.worker.workers import start_worker

pytestmark = [pytest.mark.slow]
PROMPT = "a red circle on a white background"
QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def encoded(picture: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def a_picture() -> Image.Image:
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill="red")
    return picture


def a_mask() -> Image.Image:
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((34, 8, 63, 55), fill=255)
    return mask


def write_loras(folder: Path) -> None:
    """Write a LoRA that is right, as `good`, and others that are wrong in a way of their own."""
    write_lora(folder / "good.safetensors", "kohya")
    whole = (folder / "good.safetensors").read_bytes()
    (folder / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "pickle.safetensors").write_bytes(b"\x80\x02}q\x00." * 20)
    (folder / "empty.safetensors").write_bytes(b"")
    other = {f"{QUERY}.lora_down.weight": np.ones((4, 320)), f"{QUERY}.lora_up.weight": np.ones((320, 4))}
    save_file({name: array.astype(np.float32) for name, array in other.items()}, folder / "other.safetensors")
    xl = {f"lora_te2_text_model_encoder_layers_0_mlp_fc1.{role}.weight": np.ones((4, 4), np.float32)
          for role in ("lora_down", "lora_up")}  # fmt: skip
    save_file(xl, folder / "xl.safetensors")
    good = load_file(folder / "good.safetensors")
    first = next(name for name in good if "lora_up" in name)
    save_file({**good, first: good[first] * np.float32(np.inf)}, folder / "infinite.safetensors")


@pytest.fixture(scope="module")
def worker(redis_url, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    write_loras(folder)
    more = {"SDTPU_CPU_DEVICES": "2", "SDTPU_SLOTS_PER_DEVICE": "2", "SDTPU_LORAS": str(folder)}
    with start_worker(redis_url, tmp_path_factory.mktemp("worker"), **more) as started:
        yield started


def bad_input() -> list[tuple[dict[str, Any], str]]:
    """Return parameters of jobs with what is said of each."""
    whole, good = encoded(a_picture()), data_uri(encoded(a_picture()))
    frames = {"save_all": True, "append_images": [a_mask().convert("RGB")]}
    small = data_uri(encoded(a_mask().resize((32, 32))))
    clear = a_mask().convert("RGBA")
    clear.putalpha(9)
    pictures = [
        (data_uri(whole[:80]), "image must be a whole picture, got 80 bytes that cannot be decoded to the end"),
        (data_uri(b"%!PS-Adobe-3.0 EPSF-3.0"), "image must be a PNG, JPEG or WebP picture .*bytes of something else"),
        (data_uri(encoded(a_picture(), "gif")), "bytes of something else"),
        (data_uri(b""), "image must be .*got a data URI of another kind"),
        ("redis:sdtpu:image:empty", "image must be a stored picture, got .* which expired"),
        ("redis:sdtpu:image:huge", "image must be a picture of at most 32 MiB, got 33,554,433 bytes"),
        (data_uri(encoded(Image.new("1", (6_000, 6_000)))), "at most 4,096 pixels a side, got 6,000 x 6,000"),
        (data_uri(encoded(Image.new("1", (20_000, 20_000)))), "got one of many more pixels"),
        (data_uri(encoded(a_picture().resize((32, 32)))), "image must have a size .*64x64|must be one of 64x64"),
        (data_uri(encoded(a_picture(), "webp", **frames), "webp"), "image must be one picture, got an animation of 2"),
        (data_uri(encoded(a_picture(), "png", **frames)), "image must be one picture, got an animation of 2 frames"),
        ("file:///etc/passwd", "image must be in a store of this worker"),
        ("file://../../etc/passwd", "image must be in a store of this worker"),
        ("http://127.0.0.1:9/x.png", "image must be in a store of this worker"),
        ("redis:sdtpu:unacked", "image must be in a store of this worker"),
        ("redis:sdtpu:image:../../dead", "image must be a stored picture, got .* which expired"),
        ("simplecache::file:///etc/hosts", "image must be in a store of this worker"),
        ("/etc/passwd", "image must be a URI"),
    ]
    masks = [
        (small, "mask_image must have the size of the result, 64x64 .*got 32x32"),
        (data_uri(encoded(clear)), "mask_image must have no transparent parts"),
        (data_uri(whole[:80]), "mask_image must be a whole picture"),
        ("file:///etc/passwd", "mask_image must be in a store of this worker"),
    ]
    loras = [
        ("nothing", "loras must be of empty, good, .*got 'nothing'"),
        ("../good", "loras must be of empty, good, .*got '../good'"),
        ("other", "loras: other cannot be used: .*made for another kind of checkpoint"),
        ("xl", "loras: xl cannot be used: .*is the LoRA for another one"),
        ("half", "loras: half cannot be used: .*is not a complete weights file"),
        ("empty", "loras: empty cannot be used"),
        ("pickle", "loras: pickle cannot be used: .*is a pickle"),
        ("infinite", "loras: infinite cannot be used: values are not finite"),
    ]
    return [
        *(({"image": uri}, text) for uri, text in pictures),
        *(({"image": good, "mask_image": uri}, text) for uri, text in masks),
        *(({"loras": [[name, 1.0]]}, text) for name, text in loras),
        ({"mask_image": small}, "mask_image must come with an image"),
        ({"loras": [["good", 1.0]] * 5}, "loras must be"),
        ({"image": good, "strength": 7}, "strength must be a number from 0 to 1"),
    ]


def test_bad_input_of_every_kind_fails_its_own_job_and_its_neighbours_draw_what_they_draw_alone(app, worker):
    app.backend.client.set("sdtpu:image:empty", b"", ex=600)
    app.backend.client.set("sdtpu:image:huge", bytes(MAX_PICTURE_BYTES + 1), ex=600)
    brings: list[dict[str, Any]] = [
        {},
        {"image": a_picture(), "strength": 0.5},
        {"image": a_picture(), "mask_image": a_mask()},
        {"loras": [("good", 0.5)]},
    ]

    def send_good(number: int) -> Any:
        return generate.delay(PROMPT, seed=number % len(brings), num_inference_steps=10, **brings[number % len(brings)])

    alone = [open_image(send_good(number).get(timeout=60)).tobytes() for number in range(len(brings))]
    bad, sent, neighbours = bad_input(), [], []
    for number, (kwargs, _) in enumerate(bad):
        # A client in another language checks nothing.
        sent.append(app.send_task("sdtpu.generate", args=[PROMPT], kwargs={**kwargs, "seed": 1}, queue="sdtpu"))
        if number % 3 == 0:
            neighbours.append(send_good(len(neighbours)))
    for job, (_, text) in zip(sent, bad, strict=True):
        with pytest.raises(InvalidRequest, match=rf"(?s)^{text}" if text.startswith(("loras", "mask")) else text):
            job.get(timeout=120)
    assert len(neighbours) >= 10
    for number, job in enumerate(neighbours):
        assert open_image(job.get(timeout=120)).tobytes() == alone[number % len(brings)], number
    stats = next(iter(app.control.inspect(timeout=5).stats().values()))["pool"]["sdtpu"]
    assert (stats["loop"]["failures"], stats["loop"]["retried"], stats["traces_since_ready"]) == (0, 0, 0)
