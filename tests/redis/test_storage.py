"""The image store: names that stay where they belong, URIs that are ours, stores that are in trouble."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from celery import Celery
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from redis import Redis, exceptions

from sdtpu_worker import ConfigurationError, StorageError
from sdtpu_worker.contract.result import BatchPlace, GenerationResult, StoredImage, Timings
from sdtpu_worker.images.names import stored_name
from sdtpu_worker.images.store import FileImageStore, RedisImageStore, make_image_store, read_image_bytes
from sdtpu_worker.redaction import sanitize_url
from sdtpu_worker.testing.processes import find_redis_server, free_port, private_redis, running
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(60)

HOSTILE = [
    "..", ".", "", "/", "../x", "a/../../x", "/etc/passwd", "a\x00b", "a\nb", ".hidden", "~", "%2e%2e%2f", "A", "a",
    "ä", "\ud800", "x" * 5000, "C:\\x", "\\\\host\\x", "a" * 64, stored_name(".."), "con", "a.png", "-", "*",
]  # fmt: skip
HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
TASK_IDS = st.one_of(st.text(st.characters()), st.sampled_from(HOSTILE), st.uuids().map(str), HEX, HEX.map("_".__add__))


class FlakyRedis:
    """Raises the given errors one after the other, then takes what it gets."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.data = list(errors), {}

    def set(self, key: str, data: bytes, ex: int | None) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.data[key] = data

    def get(self, key: str) -> bytes | None:
        return self.data.get(key)


def result_at(uri: str, task_id: str = "x") -> dict[str, Any]:
    image = StoredImage(uri, "png", 8, 8, 4)
    result = GenerationResult(task_id, image, "a fox", "", 1, 1, 1.0, "ddim", "m", False, None, Timings(0, 0, 0),
                              BatchPlace(0, 0, 1, 1))  # fmt: skip
    return result.to_json()


def app_with(store: str, **conf: Any) -> Celery:
    app = Celery(broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(sdtpu_image_store=store, **conf)
    return app


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(task_id=TASK_IDS)
@example(task_id="../../escaped")
def test_whatever_the_task_id_its_file_is_in_the_folder(tmp_path, task_id):
    before = files_in(tmp_path)
    store = make_image_store(app_with(""), f"file://{tmp_path}/store")
    uri = store.put(task_id, "png", b"data")
    new = files_in(tmp_path) - before - {"store"}
    assert new <= {f"store/{stored_name(task_id)}.png"}
    assert (tmp_path / "store" / f"{stored_name(task_id)}.png").read_bytes() == b"data"
    assert len(os.path.basename(uri)) < 200
    assert store.read(uri) == b"data"


@settings(deadline=None, max_examples=200)
@given(task_id=TASK_IDS)
def test_whatever_the_task_id_its_object_has_the_prefix(task_id):
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.store.clear()
    store = FileImageStore("memory://images/here")
    uri = store.put(task_id, "png", task_id.encode(errors="surrogatepass"))
    assert list(fs.store) == [f"/images/here/{stored_name(task_id)}.png"]
    assert store.read(uri) == task_id.encode(errors="surrogatepass")


@settings(deadline=None, max_examples=200)
@given(task_id=TASK_IDS)
def test_whatever_the_task_id_its_key_is_short_and_has_the_prefix(task_id):
    redis: Any = FlakyRedis()
    uri = RedisImageStore(redis, 60).put(task_id, "png", b"data")
    (key,) = redis.data
    assert uri == f"redis:{key}"
    assert key.startswith("sdtpu:image:")
    assert key.isascii()
    assert key.isprintable()
    assert len(key) <= 150


@settings(deadline=None, max_examples=500)
@given(one=TASK_IDS, other=TASK_IDS)
@example(one="A", other="a")
@example(one="..", other=stored_name(".."))
@example(one="..", other=stored_name("..")[1:])
def test_two_task_ids_never_share_a_name_also_where_case_does_not_count(one, other):
    assert (stored_name(one).casefold() == stored_name(other).casefold()) == (one == other)


def test_an_ordinary_id_is_its_own_name_and_a_second_write_replaces_the_first(tmp_path):
    store = make_image_store(app_with(""), f"file://{tmp_path}")
    task_id = "4c1a4f0e-1111-4222-8333-444455556666"
    assert store.put(task_id, "png", b"one") == store.put(task_id, "png", b"two") == f"file://{tmp_path}/{task_id}.png"
    assert files_in(tmp_path) == {f"{task_id}.png"}
    assert (tmp_path / f"{task_id}.png").read_bytes() == b"two"


@pytest.mark.parametrize("uri", [
    "file:///etc/passwd", "/etc/passwd", "file://{root}/../secret", "file://{root}/%2e%2e/secret", "file://{root}/",
    "file://{root}/a/b.png", "file://{root}/.hidden", "file://{root}2/x.png", "simplecache::file://{root}/x.png",
    "http://127.0.0.1:1/x", "memory://x", "redis:sdtpu:image:x", "redis:celery-task-meta-1", "", "local://{root}/x.png",
    "file://{root}/x.png\n", "file://{root}/x\x00.png", "FILE://{root}/x.png",
])  # fmt: skip
def test_a_result_cannot_name_a_file_outside_the_store(tmp_path, uri):
    (tmp_path / "secret").write_bytes(b"secret")
    app = app_with(f"file://{tmp_path}/store")
    with pytest.raises(StorageError, match=r"is not in the configured store, .*; set sdtpu_image_store to the worker"):
        read_image_bytes(result_at(uri.format(root=f"{tmp_path}/store")), app)


@pytest.mark.parametrize(
    "uri", ["redis:celery-task-meta-1", "redis:unacked", "redis:", "sdtpu:image:x", "file:///etc/passwd"]
)
def test_a_result_cannot_name_a_foreign_key(redis_url, uri):
    app = Celery(broker=redis_url, backend=redis_url, set_as_current=False)
    for key in ("celery-task-meta-1", "unacked", "sdtpu:image:x"):
        app.backend.client.set(key, b"secret", ex=60)
    with pytest.raises(StorageError, match="is not in the configured store"):
        read_image_bytes(result_at(uri), app)
    assert read_image_bytes(result_at("redis:sdtpu:image:x"), app) == b"secret"
    app.backend.client.delete("celery-task-meta-1", "unacked", "sdtpu:image:x")
    app.close()


@pytest.mark.parametrize("store", ["file://{root}", "redis"])
def test_only_the_image_of_the_results_own_task_is_read(tmp_path, store):
    app = app_with(store.format(root=tmp_path), sdtpu_read_image_stores=[f"file://{tmp_path}"])
    for name in ("x.png", "other.png", "secret", "x.webp"):
        (tmp_path / name).write_bytes(name.encode())
    assert read_image_bytes(result_at(f"file://{tmp_path}/x.png"), app) == b"x.png"
    for name in ("other.png", "secret", "x.png/", "x.png/../secret", "x.py", "x.webp"):
        with pytest.raises(StorageError):
            read_image_bytes(result_at(f"file://{tmp_path}/{name}"), app)


@pytest.mark.parametrize("broken", [None, 7, [], {}, {"image": 3}, {"image": {"uri": "x"}}])
def test_what_is_no_result_is_a_storage_error(broken):
    with pytest.raises(StorageError, match=r"not a result of sdtpu\.generate"):
        read_image_bytes(broken, app_with("memory://x"))


def test_an_image_that_is_gone(tmp_path):
    app = app_with(f"file://{tmp_path}")
    with pytest.raises(StorageError, match="no image at file://"):
        read_image_bytes(result_at(f"file://{tmp_path}/x.png"), app)


def test_reading_makes_no_folder(tmp_path):
    with pytest.raises(StorageError):
        read_image_bytes(result_at(f"file://{tmp_path}/new/x.png"), app_with(f"file://{tmp_path}/new"))
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize("error", [
    exceptions.ConnectionError("refused"), exceptions.TimeoutError("slow"), exceptions.BusyLoadingError("LOADING"),
    exceptions.ReadOnlyError("READONLY"), exceptions.OutOfMemoryError("OOM"), exceptions.ResponseError("MISCONF"),
    ConnectionResetError(),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_trouble_that_passes_is_waited_for(caplog, error):
    redis: Any = FlakyRedis(error, error)
    with caplog.at_level(logging.WARNING):
        assert RedisImageStore(redis, 60).put("x", "png", b"data") == "redis:sdtpu:image:x"
    assert redis.data == {"sdtpu:image:x": b"data"}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "trying again for 30 s" in caplog.text


@pytest.mark.parametrize("error", [exceptions.AuthenticationError("WRONGPASS"), exceptions.NoPermissionError("NOPERM")])
def test_trouble_that_does_not_pass_is_an_error_at_once(error):
    redis: Any = FlakyRedis(*[error] * 100)
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"Redis did not take the image of task 'x' \(4 bytes\): ") as caught:
        RedisImageStore(redis, 60).put("x", "png", b"data")
    assert time.monotonic() - started < 1
    assert caught.value.__cause__ is error


def test_the_budget_ends_the_waiting_and_the_pauses_grow(monkeypatch):
    now, pauses = [0.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    redis: Any = FlakyRedis(*[exceptions.OutOfMemoryError("command not allowed")] * 100)
    with pytest.raises(StorageError, match=r"OutOfMemoryError: command not allowed \(tried again for 30 s\)"):
        RedisImageStore(redis, 60).put("x", "png", b"data")
    assert 25 < now[0] <= 30
    assert 15 < 100 - len(redis.errors) < 25
    assert max(pauses) <= 0.1 + 1e-9


def test_the_caller_may_give_up():
    redis: Any = FlakyRedis(*[exceptions.ConnectionError("refused")] * 1000)
    with pytest.raises(StorageError, match="not tried again: the job was given up"):
        RedisImageStore(redis, 60).put("x", "png", b"data", lambda: len(redis.errors) < 997)
    assert len(redis.errors) == 996


def test_a_redis_that_restarts_gets_the_image(tmp_path, caplog):
    """Connection refused, then LOADING or an answer: the image arrives when the server does."""
    port, uris = free_port(), []
    store = make_image_store(app_with(""), f"redis://127.0.0.1:{port}/0")
    thread = threading.Thread(target=lambda: uris.append(store.put("x", "png", b"data")))
    thread.start()
    wait_until(lambda: "trying again" in caplog.text, "the first attempt to fail")
    assert not uris
    with running([find_redis_server(), "--port", str(port), "--save", ""], tmp_path / "redis.log", cwd=tmp_path):
        thread.join(20)
        assert uris == ["redis:sdtpu:image:x"]
        assert store.read(uris[0]) == b"data"


def test_a_redis_without_memory_gets_the_image_when_there_is_room_again():
    with private_redis("--maxmemory-policy", "noeviction") as url:
        client = Redis.from_url(url)
        client.config_set("maxmemory", 1)
        with pytest.raises(StorageError, match="OutOfMemoryError"):
            RedisImageStore(client, 60, budget_s=0.05).put("x", "png", bytes(1000))
        threading.Timer(0.5, client.config_set, ["maxmemory", 0]).start()
        assert make_image_store(app_with(""), url).put("x", "png", bytes(1000)) == "redis:sdtpu:image:x"


def test_a_full_disk_is_waited_for_and_a_removed_folder_is_made_again(tmp_path, monkeypatch):
    store = make_image_store(app_with(""), f"file://{tmp_path}/store")
    (tmp_path / "store").rmdir()
    store.put("x", "png", b"data")
    replace, failures = Path.replace, [OSError(errno.ENOSPC, "No space left on device")] * 2

    def full(self: Path, target: Path) -> Path:
        if failures:
            raise failures.pop()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    store.put("y", "png", b"data")
    assert files_in(tmp_path) == {"store", "store/x.png", "store/y.png"}


def test_an_image_is_on_the_disk_before_it_has_its_name_and_its_name_before_it_is_stored(tmp_path, monkeypatch):
    """After a power loss an acknowledged job had an empty file, or none."""
    done: list[str] = []
    sync, replace = os.fsync, Path.replace

    def record_sync(handle: int) -> None:
        sync(handle)
        path = Path(f"/proc/self/fd/{handle}").readlink()
        done.append("data on the disk" if path.name.startswith(".x.png.") else f"names of {path.name} on the disk")

    def record_rename(self: Path, target: Path) -> Path:
        done.append("renamed")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_rename)
    store = make_image_store(app_with(""), f"file://{tmp_path}/new/store")
    assert done[:2] == ["names of new on the disk", f"names of {tmp_path.name} on the disk"]
    done.clear()
    store.put("x", "png", b"data")
    assert done == ["data on the disk", "renamed", "names of store on the disk"]


@pytest.mark.parametrize(("code", "is_refused"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_flush_a_folder_is_taken_as_it_is(tmp_path, monkeypatch, code, is_refused):
    sync = os.fsync

    def sync_files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        sync(handle)

    monkeypatch.setattr(os, "fsync", sync_files_only)
    store = FileImageStore(f"file://{tmp_path}", budget_s=0.0)
    with pytest.raises(StorageError) if is_refused else contextlib.nullcontext():
        store.put("x", "png", b"data")
    assert (tmp_path / "x.png").read_bytes() == b"data"


def test_a_folder_without_permission_is_an_error_at_once(monkeypatch, tmp_path):
    store = FileImageStore(f"file://{tmp_path}")
    monkeypatch.setattr(
        "sdtpu_worker.images.file_store.write_durably", lambda *_: (_ for _ in ()).throw(PermissionError())
    )
    with pytest.raises(StorageError, match=r"could not be written to file://.*PermissionError"):
        store.put("x", "png", b"data")


def test_reading_from_a_redis_that_is_gone():
    app = app_with(f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(StorageError, match="Redis could not be read for redis:sdtpu:image:x"):
        read_image_bytes(result_at("redis:sdtpu:image:x"), app)


PASSWORDS = st.text(st.characters(codec="ascii", exclude_characters="\\"), min_size=8).filter(lambda p: p.strip("*"))


@settings(deadline=None)
@given(password=PASSWORDS, user=st.sampled_from(["", "worker"]))
def test_no_password_of_any_url_is_left(password, user):
    secret = quote(password, safe="")
    urls = [f"redis://{user}:{secret}@host:6379/0", f"rediss://{user}:{secret}@host/0?ssl_cert_reqs=required",
            f"sentinel://:{secret}@one:26379;sentinel://:{secret}@two:26379", f"s3://KEY:{secret}@bucket/x",
            f"unix://{user}@/run/redis.sock?db=0&password={secret}", f"abfs://c@a.dfs/x?sig={secret}"]  # fmt: skip
    for url in urls:
        for text in (url, f"got {url!r}: no", f"{url} and {url}", json.dumps({"url": url})):
            assert f":{secret}" not in sanitize_url(text)
            assert f"={secret}" not in sanitize_url(text)
            assert "host" in sanitize_url(text) or "host" not in text.replace(password, "")


@pytest.mark.parametrize("url", ["redis://localhost:6379/0", "file:///srv/images", "s3://bucket/images", "no url", ""])
def test_a_url_without_secrets_is_left_as_it_is(url):
    assert sanitize_url(url) == url


def test_a_raw_at_sign_or_slash_in_a_password_does_not_show():
    assert sanitize_url("redis://:p@ss/w0rd@host/0") == "redis://:**@host/0"


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:hunter2-s3cret@127.0.0.1:port/0",
        "redis://:hunter2/s3cret@host/0",
        "nonsense://me:hunter2-s3cret@x",
        "ftp://me:hunter2-s3cret@127.0.0.1:1/x",
    ],
)
def test_no_error_about_a_url_has_its_password(url):
    with pytest.raises(ConfigurationError, match="sdtpu_image_store must be") as caught:
        make_image_store(app_with(""), url)
    assert "s3cret" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_no_password_in_errors_and_representations_of_a_store():
    url = f"redis://me:hunter2-s3cret@127.0.0.1:{free_port()}/0"
    store: Any = make_image_store(app_with(""), url)
    store.budget_s = 0
    with pytest.raises(StorageError) as caught:
        store.put("x", "png", b"data")
    app = app_with("redis", result_backend="cache+memory://me:hunter2-s3cret@host/")
    with pytest.raises(ConfigurationError, match="needs a Redis result backend") as refused:
        make_image_store(app, "redis")
    for text in (repr(store), repr(store.client), str(caught.value), str(refused.value)):
        assert "s3cret" not in text


def test_results_read_from_a_dataclass_too(tmp_path):
    app = app_with(f"file://{tmp_path}")
    uri = make_image_store(app, f"file://{tmp_path}").put("x", "png", b"data")
    result = GenerationResult.from_json(result_at("elsewhere"))
    result = dataclasses.replace(result, image=dataclasses.replace(result.image, uri=uri))
    assert read_image_bytes(result, app) == b"data"


class ObjectStore:
    """An object store that keeps what it is given, with the options, and may lack rights."""

    def __init__(self, protocol: Any, may_make: bool = True, may_write: bool = True, may_delete: bool = True) -> None:
        self.protocol, self.may_make, self.may_write, self.may_delete = protocol, may_make, may_write, may_delete
        self.objects: dict[str, tuple[bytes, dict[str, Any]]] = {}

    def unstrip_protocol(self, path: str) -> str:
        return f"s3://{path}"

    def makedirs(self, path: str, exist_ok: bool) -> None:
        if not self.may_make:
            raise PermissionError("s3:CreateBucket is not allowed")

    def pipe_file(self, path: str, data: bytes, **options: Any) -> None:
        if not self.may_write:
            raise PermissionError("s3:PutObject is not allowed")
        self.objects[path] = data, options

    def rm_file(self, path: str) -> None:
        if not self.may_delete:
            raise PermissionError("s3:DeleteObject is not allowed")
        del self.objects[path]


@pytest.fixture
def object_store(monkeypatch):
    """Give a function that makes an image store on an `ObjectStore`."""

    def make(*args: Any, **rights: bool) -> tuple[FileImageStore, ObjectStore]:
        fs = ObjectStore(*args, **rights)
        monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (fs, "bucket/images"))
        return FileImageStore("s3://bucket/images", budget_s=0), fs

    return make


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        (("s3", "s3a"), {"ContentType": "image/webp"}),
        (("gs", "gcs"), {"content_type": "image/webp"}),
        ("sftp", {}),
    ],
)
def test_an_object_is_stored_with_its_content_type_where_the_file_system_takes_one(object_store, protocol, options):
    """Objects in S3 had none, so browsers downloaded them instead of showing them."""
    store, fs = object_store(protocol)
    store.put("x", "webp", b"data")
    assert fs.objects == {"bucket/images/x.webp": (b"data", options)}


def test_a_bucket_that_can_be_written_needs_no_right_to_make_one_or_to_delete(object_store):
    store, fs = object_store("s3", may_make=False)
    store.prepare()
    assert fs.objects == {}
    store, _ = object_store("s3", may_make=False, may_delete=False)
    store.prepare()


def test_a_store_that_cannot_be_written_is_found_at_the_start(object_store, tmp_path):
    store, _ = object_store("s3", may_write=False)
    with pytest.raises(ConfigurationError, match=r"sdtpu_image_store must be .*s3:PutObject is not allowed"):
        store.prepare()
    store, _ = object_store("s3", may_make=False, may_write=False)
    with pytest.raises(ConfigurationError, match="s3:CreateBucket is not allowed"):
        store.prepare()


def test_a_store_that_other_processes_cannot_read_is_found_at_the_start(caplog, tmp_path):
    app = Celery("stores", backend="cache+memory://", set_as_current=False)
    with pytest.raises(ConfigurationError, match="a store in memory cannot be read by other processes"):
        make_image_store(app, "memory://images")
    (tmp_path / "private").mkdir(mode=0o700)
    make_image_store(app, f"file://{tmp_path}/private")
    assert "only the worker's user, or its group, can read the images in" in caplog.text
    assert list((tmp_path / "private").iterdir()) == []
    caplog.clear()
    (tmp_path / "public").mkdir()
    (tmp_path / "public").chmod(0o755)
    make_image_store(app, f"file://{tmp_path}/public")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
