"""Results and stored bytes that a stranger wrote: nothing is made of them, and every refusal is a StorageError."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from celery import Celery
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageFile
from redis import Redis, exceptions

from sdtpu_worker import ConfigurationError, StorageError, image_content_type, open_image, read_image_bytes
from sdtpu_worker.config import read_config, read_setting
from sdtpu_worker.contract.request import IMAGE_FORMATS
from sdtpu_worker.contract.result import BatchPlace, GenerationResult, StoredImage, Timings
from sdtpu_worker.images.decode import CONTENT_TYPES
from sdtpu_worker.images.encode import encode_image
from sdtpu_worker.images.store import FileImageStore, RedisImageStore, make_image_store

pytestmark = pytest.mark.timeout(60)

TEMPLATE = json.dumps({"version": 1, "templates": {"x": "{{ 7 * 7 }}"}, "refs": {"x.png": ["memory://{{ x }}", 0, 1]}})
FORGED_URIS = [
    f"reference::data:application/json;base64,{base64.b64encode(TEMPLATE.encode()).decode()}/x.png",
    "reference://x.png", "simplecache::memory://stolen/x.png", "memory://stolen/x.png", "memory:///stolen/x.png",
    "data:image/png;base64,AAAA/x.png", "http://127.0.0.1:1/x.png", "https://127.0.0.1:1/x.png",
    "ftp://127.0.0.1:1/x.png", "zip://x.png::http://127.0.0.1:1/a.zip", "github://a:b@main/x.png",
    "file:///etc/x.png", "/etc/x.png", "redis://127.0.0.1:1/0/x.png", "redis:celery-task-meta-x", "redis:sdtpu:image:y",
    "redis:sdtpu:image:x/x.png", "x.png", "", "\ud800/x.png", "a" * 1_000_000 + "/x.png", "://@" * 100_000 + "/x.png",
]  # fmt: skip


def result_of(**image: Any) -> dict[str, Any]:
    """Return the result of task `x`, an image of 8 x 8 pixels, with some of what it says of the image changed."""
    stored = StoredImage("redis:sdtpu:image:x", "png", 8, 8, 4)
    result = GenerationResult("x", stored, "a fox", "", 1, 1, 1.0, "ddim", "m", False, None, Timings(0, 0, 0),
                              BatchPlace(0, 0, 1, 1)).to_json()  # fmt: skip
    return {**result, "image": {**result["image"], **image}}


def make_app(**conf: Any) -> Celery:
    app = Celery(broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(conf)
    return app


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what file systems and connections are made of, from now on."""
    seen: list[str] = []
    url_to_fs = fsspec.core.url_to_fs

    def record(url: str, **options: Any) -> Any:
        seen.append(url)
        return url_to_fs(url, **options)

    monkeypatch.setattr(fsspec.core, "url_to_fs", record)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: seen.append(str(address)))
    return seen


@pytest.mark.parametrize("uri", FORGED_URIS, ids=lambda uri: repr(uri[:30]))
@pytest.mark.parametrize("store", [None, "redis", "file"])
def test_nothing_is_made_of_what_a_result_names(tmp_path, made, uri, store):
    fsspec.filesystem("memory").pipe_file("/stolen/x.png", b"secret")
    own = f"file://{tmp_path}"
    app = make_app(**({} if store is None else {"sdtpu_image_store": own if store == "file" else store}))
    for read in (read_image_bytes, open_image):
        with pytest.raises(StorageError) as caught:
            read(result_of(uri=uri), app)
        assert len(str(caught.value)) < 2000
        str(caught.value).encode()
    assert set(made) <= ({own} if store == "file" else set())


def test_redis_that_is_set_and_redis_that_is_not_are_the_same(tmp_path):
    (tmp_path / "x.png").write_bytes(b"data")
    for conf in ({}, {"sdtpu_image_store": "redis"}):
        with pytest.raises(StorageError):
            read_image_bytes(result_of(uri=f"file://{tmp_path}/x.png"), make_app(**conf))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(st.characters()),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(st.characters()), parts, max_size=3),
    max_leaves=8,
)
URIS = st.sampled_from(["redis:sdtpu:image:x", "memory:///forged/x.png", "memory:///forged/y.png", *FORGED_URIS[:20]])
IMAGES = st.fixed_dictionaries(
    {
        "uri": URIS | JSON,
        "format": st.sampled_from(IMAGE_FORMATS) | JSON,
        "width": st.just(8) | JSON,
        "height": st.just(8) | JSON,
        "bytes": st.just(4) | JSON,
    },
    optional={"more": JSON},
)
VALID = st.sampled_from([result_of(), {**result_of(), "task_id": "y"}])
CHANGES = st.dictionaries(st.sampled_from(sorted(result_of())) | st.text(), JSON, max_size=2)
RESULTS = JSON | st.builds(
    lambda result, image, changes: {**result, "image": image, **changes}, VALID, IMAGES | JSON, CHANGES
)
PICTURE = encode_image(np.zeros((8, 8, 3), np.uint8), "png", {})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=400)
@given(result=RESULTS, stored=st.just(PICTURE) | st.binary())
@example(result=result_of(uri="memory:///forged/x.png"), stored=PICTURE)
@example(result=result_of(uri="memory:///forged/x.png", width=True), stored=PICTURE)
@example(result=result_of(uri="memory:///forged/x.png", width=10**5000), stored=PICTURE)
@example(result={**result_of(), "image": []}, stored=b"")
@example(result={**result_of(), "task_id": "\ud800"}, stored=b"")
def test_whatever_a_result_holds_it_is_the_tasks_own_image_or_a_storage_error(made, result, stored):
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pipe({"/forged/x.png": stored, "/forged/y.png": stored, "/other/x.png": b"another's"})
    own = ["memory://forged", "memory://empty"]
    for app in (make_app(sdtpu_image_store=own[0]), make_app(sdtpu_read_image_stores=own)):
        made.clear()
        for read in (read_image_bytes, open_image):
            try:
                found: Any = read(result, app)
            except StorageError as exc:
                str(exc).encode()
            else:
                assert found == stored or found.size == (8, 8)
                assert result["image"]["uri"] == f"memory:///forged/{result['task_id']}.png"
        assert set(made) <= set(own)
    with contextlib.suppress(StorageError):
        assert image_content_type(result) in ("image/png", "image/jpeg", "image/webp")


def test_a_result_nested_as_deep_as_json_allows():
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    for name in ("uri", "format", "width"):
        with pytest.raises(StorageError):
            open_image(result_of(**{name: deep}), make_app())


def test_further_stores_are_read_each_by_its_own_prefix(tmp_path, redis_url):
    old, older = f"file://{tmp_path}/old", f"file://{tmp_path}/old/older"
    app = Celery(broker="memory://", backend=redis_url, set_as_current=False)
    app.conf.update(sdtpu_image_store=f"file://{tmp_path}/new", sdtpu_read_image_stores=["redis", old, older])
    uris = [make_image_store(app, url).put("x", "png", url.encode()) for url in ("redis", old, older)]
    assert [read_image_bytes(result_of(uri=uri), app).decode() for uri in uris] == ["redis", old, older]
    for folder in ("new", "old"):
        with pytest.raises(StorageError, match=r"no image at|not in the configured store"):
            read_image_bytes({**result_of(uri=f"file://{tmp_path}/{folder}/y.png"), "task_id": "y"}, app)
    app.backend.client.delete("sdtpu:image:x")
    app.close()


def test_two_redis_servers_are_asked_in_their_order(monkeypatch):
    servers = {
        "redis://first/0": {"sdtpu:image:x": b"first"},
        "redis://second/0": {"sdtpu:image:x": b"second", "sdtpu:image:y": b"y"},
    }
    monkeypatch.setattr(
        Redis, "from_url", lambda url, **_: type("Client", (), {"get": staticmethod(servers[url].get)})()
    )
    app = make_app(sdtpu_image_store="redis://first/0", sdtpu_read_image_stores=["redis://second/0"])
    assert read_image_bytes(result_of(), app) == b"first"
    assert read_image_bytes({**result_of(uri="redis:sdtpu:image:y"), "task_id": "y"}, app) == b"y"
    with pytest.raises(StorageError, match=r"no image at redis:sdtpu:image:z: it expired"):
        read_image_bytes({**result_of(uri="redis:sdtpu:image:z"), "task_id": "z"}, app)


def test_a_store_that_cannot_be_used_hides_no_other_and_is_named(tmp_path):
    (tmp_path / "x.png").write_bytes(b"data")
    app = make_app(sdtpu_read_image_stores=f"nonsense://a:hunter2@b,file://{tmp_path}")  # and redis, without a backend
    assert read_image_bytes(result_of(uri=f"file://{tmp_path}/x.png"), app) == b"data"
    with pytest.raises(StorageError, match="cannot be read: sdtpu_image_store = 'redis' needs a Redis") as caught:
        read_image_bytes(result_of(), app)
    assert isinstance(caught.value.__cause__, ConfigurationError)
    app.conf.sdtpu_image_store = f"file://{tmp_path}/new"
    with pytest.raises(StorageError, match=r"sdtpu_read_image_stores must be redis, .* got 'nonsense://") as caught:
        read_image_bytes(result_of(uri="redis:sdtpu:image:x"), app)
    assert "hunter2" not in str(caught.value)
    app.conf.sdtpu_read_image_stores = 7
    with pytest.raises(StorageError, match="sdtpu_read_image_stores must be a list of"):
        read_image_bytes(result_of(), app)


@pytest.mark.parametrize("url", ["simplecache::memory://x", "filecache::file:///x", "dir::memory://x", "reference::x"])
def test_a_chained_url_is_refused_where_it_is_configured(url):
    with pytest.raises(ConfigurationError, match=r"must not be a chained URL .* name the store itself"):
        make_image_store(make_app(), url)


def test_the_setting_is_a_list_or_a_string_with_commas(monkeypatch):
    name = "sdtpu_read_image_stores"
    assert read_setting(name, {}) == ()
    assert read_setting(name, {name: ""}) == ()
    assert read_setting(name, {name: ["redis", "s3://b/x", "redis"]}) == ("redis", "s3://b/x")
    monkeypatch.setenv(name.upper(), "redis, file:///srv/old,")
    assert read_setting(name, {name: ["memory://x"]}) == ("redis", "file:///srv/old")
    monkeypatch.delenv(name.upper())
    for wrong in (7, {"redis": 1}, ["redis://:hunter2@h/0", 7]):
        with pytest.raises(ConfigurationError, match="sdtpu_read_image_stores must be a list of") as caught:
            read_config({name: wrong})
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("error", [
    exceptions.ConnectionError("refused"), exceptions.ResponseError("WRONGTYPE"), ConnectionResetError(),
    TypeError("unexpected keyword argument"), UnicodeError(), RuntimeError(), ImportError("Please install gcsfs"),
    KeyError("x"), EOFError(),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_whatever_a_store_raises_is_a_storage_error(monkeypatch, error):
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    app = make_app(sdtpu_image_store="redis://127.0.0.1:1/0")
    monkeypatch.setattr(Redis, "get", fail)
    with pytest.raises(StorageError, match="Redis could not be read"):
        read_image_bytes(result_of(), app)
    app.conf.sdtpu_image_store = "memory://x"
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", fail)
    with pytest.raises(StorageError, match=r"no image at memory:///x/x\.png"):
        read_image_bytes(result_of(uri="memory:///x/x.png"), app)
    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(StorageError, match=r"sdtpu_image_store must be redis, a redis:// URL"):
        read_image_bytes(result_of(uri="memory:///x/x.png"), app)


def test_a_redis_key_of_another_type_or_text_instead_of_bytes(redis_url):
    app = make_app(sdtpu_image_store=f"{redis_url}?decode_responses=True")
    with Redis.from_url(redis_url) as client:
        client.set("sdtpu:image:x", "text", ex=60)
        with pytest.raises(StorageError, match="remove decode_responses"):
            read_image_bytes(result_of(), app)
        client.delete("sdtpu:image:x")
        client.lpush("sdtpu:image:x", "a list")
        with pytest.raises(StorageError, match="WRONGTYPE"):
            read_image_bytes(result_of(), app)
        client.delete("sdtpu:image:x")


def open_bytes(tmp_path: Path, data: bytes, image_format: str = "png", **image: Any) -> Image.Image:
    store = FileImageStore(f"file://{tmp_path}")
    uri = store.put("x", image_format, data)
    app = make_app(sdtpu_image_store=f"file://{tmp_path}")
    return open_image(result_of(uri=uri, format=image_format, **image), app)


def encoded(image_format: str, width: int = 8, height: int = 8, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, image_format, **options)
    return buffer.getvalue()


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG that claims a size and has these chunks after its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = b"".join(chunk(kind, data) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_a_picture_of_its_format_and_size_opens(tmp_path, image_format):
    data = encode_image(np.full((16, 8, 3), 200, np.uint8), image_format, {})
    image = open_bytes(tmp_path, data, image_format, width=8, height=16)
    assert (image.format, image.size, image.getpixel((3, 3))) == (image_format.upper(), (8, 16), (200, 200, 200))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
BYTES = {
    "EPS": EPS, "GIF": encoded("gif"), "BMP": encoded("bmp"), "TIFF": encoded("tiff"), "JPEG": encoded("jpeg"),
    "nothing": b"", "garbage": b"garbage" * 100, "cut off": encoded("png")[:-30], "another size": encoded("png", 16, 8),
    "broken": encoded("png").replace(b"IDAT", b"IDAX"), "a bomb": png_of(60_000, 60_000),
    "large": png_of(12_000, 9_000),
    "a bomb of text": png_of(8, 8, *[(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(1_000_000))) for i in range(80)]),
}  # fmt: skip


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("strict", [True, False], ids=["warnings are errors", "warnings are not"])
def test_whatever_else_is_stored_is_a_storage_error(tmp_path, monkeypatch, kind, strict):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    with warnings.catch_warnings(action="error" if strict else "ignore"):
        with pytest.raises(StorageError, match=r"the stored ([\d,]+ bytes are not a PNG of 8 x 8|image is a PNG of)"):
            open_bytes(tmp_path, BYTES[kind])


@pytest.mark.parametrize("kind", ["another size", "large", "a bomb"])
def test_no_pixel_of_another_size_is_decoded(tmp_path, monkeypatch, kind):
    loaded: list[Any] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: loaded.append(self.size))
    with warnings.catch_warnings(action="ignore"), pytest.raises(StorageError):
        open_bytes(tmp_path, BYTES[kind])
    assert loaded == []


def test_a_result_cannot_claim_more_pixels_than_any_worker_makes(tmp_path):
    with pytest.raises(StorageError, match="width and height must be integers from 1 to 4096"):
        open_bytes(tmp_path, png_of(12_000, 9_000), width=12_000, height=9_000)


def test_a_jpeg_of_several_pictures_is_not_one(tmp_path):
    data = encoded("mpo", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    with pytest.raises(StorageError, match="the stored image is a MPO of 8 x 8 pixels, but its result says JPEG"):
        open_bytes(tmp_path, data, "jpeg")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(data=st.data(), image_format=st.sampled_from(IMAGE_FORMATS))
def test_damaged_pictures_open_or_are_storage_errors(tmp_path, data, image_format):
    whole = bytearray(encoded(image_format))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.integers(0, len(whole)))
    with contextlib.suppress(StorageError):
        assert open_bytes(tmp_path, bytes(whole[:length]), image_format).size == (8, 8)


def test_every_format_has_a_content_type_and_nothing_else_has():
    assert sorted(CONTENT_TYPES) == sorted(IMAGE_FORMATS)
    types = [image_content_type(result_of(format=name)) for name in IMAGE_FORMATS]
    assert types == ["image/png", "image/jpeg", "image/webp"]
    for forged in ("svg+xml", "PNG", "", "png\r\nSet-Cookie: a=b", None, ["png"], {"png": 1}):
        with pytest.raises(StorageError, match=r"format must be|must be strings"):
            image_content_type(result_of(format=forged))


def test_the_uri_that_a_store_expects_is_the_one_that_it_gives(tmp_path):
    class Client(Any):
        def set(self, *_: Any, **__: Any) -> None: ...

    for store in (FileImageStore(f"file://{tmp_path}"), RedisImageStore(Client(), 60)):
        for task_id in ("x", "A", "../x", "\ud800"):
            assert store.uri_of(task_id, "webp") == store.put(task_id, "webp", b"data")
