"""Pictures on their way to a worker: put into the store by the client, named in the message, opened by rule."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from celery import group
from PIL import Image

from sdtpu_worker import GenerationRequest, InvalidRequest, StorageError, generate
from sdtpu_worker.images import pictures
from sdtpu_worker.images.bring import bring_pictures
from sdtpu_worker.images.open_pictures import PictureOpener
from sdtpu_worker.images.store import find_store, further_stores

pytestmark = pytest.mark.usefixtures("redis")
DRAW = np.random.default_rng(0)
PIXELS = DRAW.integers(0, 256, (8, 6, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)


def encoded(picture: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def waiting_messages(app) -> list[dict[str, Any]]:
    with app.connection_for_read() as connection:
        client = connection.default_channel.client
        names = [key for key in client.keys("sdtpu*") if client.type(key) == b"list"]
        return [json.loads(message) for name in names for message in client.lrange(name, 0, -1)]


def opened(data: bytes) -> np.ndarray:
    return np.asarray(pictures.decode_picture("image", data))


@pytest.fixture(params=["redis", "file"])
def store(request, app, tmp_path, monkeypatch):
    url = "redis" if request.param == "redis" else f"file://{tmp_path}/pictures"
    monkeypatch.setitem(app.conf, "sdtpu_image_store", url)
    return find_store(app, 1.0)


def test_a_picture_is_stored_once_under_its_content_and_opened_again(app, store):
    data = encoded(RGB)
    first, second, other = (
        bring_pictures(app, {"image": given})["image"] for given in (data, bytearray(data), encoded(RGB, "webp"))
    )
    assert first == second != other
    assert store.owns(first)
    found = PictureOpener([store]).open(GenerationRequest("x", image=first, mask_image=first))
    np.testing.assert_array_equal(np.asarray(found["image"]), PIXELS)
    assert np.asarray(found["mask_image"]).dtype == bool
    np.testing.assert_array_equal(np.asarray(found["mask_image"]), np.asarray(RGB.convert("L")) >= 128)


def test_a_picture_in_redis_expires_with_the_results_and_anew_when_it_is_brought_again(app, monkeypatch):
    monkeypatch.setitem(app.conf, "result_expires", 100)
    uri = bring_pictures(app, {"image": encoded(RGB)})["image"]
    client, key = app.backend.client, uri.removeprefix("redis:")
    assert 90 < client.ttl(key) <= 100
    client.expire(key, 5)
    assert bring_pictures(app, {"image": encoded(RGB)})["image"] == uri
    assert 90 < client.ttl(key) <= 100


def test_the_message_names_the_picture_and_stays_small(app):
    large = Image.fromarray(DRAW.integers(0, 256, (600, 600, 3), dtype=np.uint8))
    generate.delay("x", image=large, mask_image=encoded(RGB))
    (message,) = waiting_messages(app)
    assert len(json.dumps(message)) < 4000
    _, kwargs, _ = json.loads(base64.b64decode(message["body"]))
    assert all("_picture-" in kwargs[name] for name in ("image", "mask_image"))


def test_a_group_and_a_signature_hold_names_and_no_pictures(app):
    signatures = group(generate.s("x", image=RGB), generate.s("y", image=encoded(RGB)))
    named = [signature.kwargs["image"] for signature in signatures.tasks]
    assert all(uri.startswith("redis:sdtpu:image:_picture-") for uri in named)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (b"", r"image must be a PNG, JPEG or WebP .*got nothing"),
        (b"GIF89a" + bytes(40), "got 46 bytes of something else"),
        (Path("/nowhere/x.png"), "image must be a file that can be read, got /nowhere/x.png: No such file"),
        (Path("/"), "image must be a file that can be read, got /: Is a directory"),
        ("photo.png", r"image must be a URI .*got 'photo.png'; a file is named with pathlib.Path"),
        ("/etc/passwd", "image must be a URI"),
        ("data:image/gif;base64,R0lG", "a data URI of another kind"),
        ("data:image/png;base64,AAA", "base64"),
        ("redis:" + "x" * 3000, "at most 2,048 characters"),
        (7, "image must be a URI .*got 7"),
        ({"image": {}}, "image must be a URI"),
        (["a"], "image must be a URI"),
    ],
)
def test_what_is_no_picture_is_refused_where_the_job_is_enqueued(app, given, text):
    with pytest.raises(InvalidRequest, match=text):
        generate.delay("x", image=given)
    assert waiting_messages(app) == []


def test_a_store_that_does_not_answer_is_an_error_after_seconds(app, monkeypatch):
    monkeypatch.setitem(app.conf, "sdtpu_image_store", "redis://127.0.0.1:1/0")
    with pytest.raises(StorageError, match="Redis did not take a picture"):
        generate.delay("x", image=RGB)
    monkeypatch.setitem(app.conf, "sdtpu_image_store", "simplecache::file:///tmp/x")
    with pytest.raises(StorageError, match="image could not be stored: sdtpu_image_store must not be a chained URL"):
        generate.delay("x", image=RGB)


def test_a_worker_reads_further_stores_and_says_what_is_gone(app, tmp_path, monkeypatch):
    old = tmp_path / "old"
    monkeypatch.setitem(app.conf, "sdtpu_image_store", f"file://{old}")
    uri = bring_pictures(app, {"image": encoded(RGB)})["image"]
    monkeypatch.setitem(app.conf, "sdtpu_image_store", "redis")
    request = GenerationRequest("x", image=uri)
    with pytest.raises(InvalidRequest, match="image must be in a store of this worker"):
        PictureOpener([find_store(app, 1.0)]).open(request)
    monkeypatch.setitem(app.conf, "sdtpu_read_image_stores", [f"file://{old}"])
    opener = PictureOpener([find_store(app, 1.0), *further_stores(app)])
    assert np.asarray(opener.open(request)["image"]).shape == PIXELS.shape
    (file,) = old.iterdir()
    file.unlink()
    with pytest.raises(InvalidRequest, match=r"image must be a stored picture, got .* which expired"):
        opener.open(request)


def test_nothing_but_regular_files_in_the_folder_is_read(tmp_path, monkeypatch, app):
    folder = tmp_path / "pictures"
    monkeypatch.setitem(app.conf, "sdtpu_image_store", f"file://{folder}")
    opener = PictureOpener([find_store(app, 0.0)])
    bring_pictures(app, {"image": encoded(RGB)})
    (tmp_path / "outside.png").write_bytes(encoded(RGB))
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "sub").mkdir()
    (folder / "sub" / "x.png").write_bytes(encoded(RGB))
    for name in ("link.png", "pipe.png", "sub"):
        with pytest.raises(StorageError, match="could not be read"):
            opener.open(GenerationRequest("x", image=f"file://{folder}/{name}"))
    for name in ("sub/x.png", "../outside.png", "%2e%2e/outside.png", "..", ""):
        with pytest.raises(InvalidRequest, match=r"in a store of this worker|which expired"):
            opener.open(GenerationRequest("x", image=f"file://{folder}/{name}"))


def test_no_more_of_a_key_or_a_file_is_read_than_a_picture_may_have(app, monkeypatch, tmp_path):
    monkeypatch.setattr("sdtpu_worker.images.redis_store.MAX_PICTURE_BYTES", 1000)
    monkeypatch.setattr("sdtpu_worker.images.file_store.MAX_PICTURE_BYTES", 1000)
    app.backend.client.set("sdtpu:image:huge", b"x" * 100_000)
    assert len(find_store(app, 1.0).read_picture("redis:sdtpu:image:huge")) == 1001
    (tmp_path / "huge.png").write_bytes(b"x" * 100_000)
    monkeypatch.setitem(app.conf, "sdtpu_image_store", f"file://{tmp_path}")
    assert len(find_store(app, 1.0).read_picture(f"file://{tmp_path}/huge.png")) == 1001
    app.backend.client.lpush("sdtpu:image:list", "x")
    monkeypatch.setitem(app.conf, "sdtpu_image_store", "redis")
    with pytest.raises(StorageError, match="WRONGTYPE"):
        find_store(app, 1.0).read_picture("redis:sdtpu:image:list")


def test_every_kind_of_picture_has_a_rule():
    np.testing.assert_array_equal(opened(encoded(RGB)), PIXELS)
    np.testing.assert_array_equal(opened(encoded(RGB, "webp", lossless=True)), PIXELS)
    grey = RGB.convert("L")
    np.testing.assert_array_equal(opened(encoded(grey)), np.repeat(np.asarray(grey)[..., None], 3, -1))
    deep = DRAW.integers(0, 65536, (8, 6)).astype(np.uint16)
    assert np.abs(opened(encoded(Image.fromarray(deep)))[..., 0] - deep / 257).max() < 1
    assert opened(encoded(RGB.convert("CMYK"), "jpeg", quality=95)).shape == (8, 6, 3)
    np.testing.assert_array_equal(opened(encoded(RGB.convert("1"))), np.asarray(RGB.convert("1").convert("RGB")))
    np.testing.assert_array_equal(opened(encoded(RGB.convert("P"))), np.asarray(RGB.convert("P").convert("RGB")))
    clear = RGB.convert("RGBA")
    clear.putalpha(0)
    assert (opened(encoded(clear)) == 255).all()
    half = RGB.convert("RGBA")
    half.putalpha(128)
    assert np.abs(opened(encoded(half)).astype(int) - (PIXELS * (128 / 255) + 255 * (127 / 255))).max() <= 1
    palette = RGB.convert("P")
    palette.info["transparency"] = 0
    assert opened(encoded(palette, transparency=0)).shape == (8, 6, 3)
    with pytest.raises(InvalidRequest, match="mask_image must have no transparent parts"):
        pictures.decode_mask("mask_image", encoded(half))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = opened(encoded(RGB, "png", exif=exif))
    names = ["", "", "fliplr", "rot180", "flipud", "transpose", "rot270", "anti", "rot90"]
    turns: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "fliplr": lambda a: a[:, ::-1],
        "flipud": lambda a: a[::-1],
        "rot180": lambda a: a[::-1, ::-1],
        "transpose": lambda a: a.transpose(1, 0, 2),
        "anti": lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        "rot90": np.rot90,
        "rot270": lambda a: np.rot90(a, 3),
    }
    expected = turns[names[orientation]](PIXELS) if names[orientation] else PIXELS
    np.testing.assert_array_equal(turned, expected)


def test_broken_pictures_end_in_one_kind_of_error():
    whole = encoded(RGB)
    for data in (*(whole[:n] for n in range(1, len(whole) - 12, 7)), *_flipped(whole)):
        with contextlib.suppress(InvalidRequest):  # any other error would come through
            opened(data)
    animated = encoded(RGB, "webp", save_all=True, append_images=[RGB.rotate(180)])
    for data, text in (
        (animated, "got an animation of 2 frames"),
        (encoded(RGB, "png", save_all=True, append_images=[RGB.rotate(180)]), "got an animation of 2 frames"),
        (encoded(Image.new("L", (5000, 3))), "got 5,000 x 3"),
        (encoded(Image.new("1", (12_000, 12_000))), "got one of many more pixels"),
        (bytes(pictures.MAX_PICTURE_BYTES + 1), "at most 32 MiB"),
    ):
        with pytest.raises(InvalidRequest, match=text):
            opened(data)


def _flipped(data: bytes):
    for at, bit in itertools.product(range(0, len(data), 11), (0, 7)):
        broken = bytearray(data)
        broken[at] ^= 1 << bit
        yield bytes(broken)


def test_a_stored_picture_can_be_read_by_the_workers_user(app, tmp_path, monkeypatch):
    monkeypatch.setitem(app.conf, "sdtpu_image_store", f"file://{tmp_path}/pictures")
    uri = bring_pictures(app, {"image": encoded(RGB)})["image"]
    assert stat.S_IMODE(Path(uri.removeprefix("file://")).stat().st_mode) == 0o644
