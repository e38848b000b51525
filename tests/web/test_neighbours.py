"""What a Django project has beside this package: celery-progress, django-celery-results, django-storages."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from celery import group
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer

from sdtpu_worker import GenerationFailed, generate
from sdtpu_worker.testing import StandInWorker, stand_in_worker
from sdtpu_worker.testing import stand_in as without_devices
from tests.support.clients import client_app
from tests.web.scripts import Page

pytestmark = pytest.mark.usefixtures("site")

FILES = Path(str(files("sdtpu_worker.web.page") / "files"))
CARD = FILES / "card-on-a-page.js"
IN_TEST = {"sdtpu_web_owner": "tests.web.django_site.find_owner"}


@pytest.fixture
def stand_in(app: Any) -> Iterator[StandInWorker]:
    """Take the jobs of the project, and run what follows them at once."""
    app.conf.task_always_eager = True
    with stand_in_worker(app) as worker:
        yield worker


def make_page() -> Page:
    """Return a page of ann's."""
    from django.test import Client

    visitor = Client(headers={"X-User": "ann"})

    def answer(method: str, url: str, headers: dict[str, str]) -> tuple[int, bytes]:
        reply = visitor.generic(method, url.removeprefix("http://testserver"), headers=headers)
        return reply.status_code, reply.content

    return Page(answer)


def new_row(prompt: str = "a fox") -> Any:
    from sdtpu_worker.contrib.django.models import GeneratedImage

    return GeneratedImage.objects.generate(prompt, owner="ann", num_inference_steps=40)


# celery-progress


def script_of_celery_progress() -> Path:
    return Path(str(files("celery_progress") / "static" / "celery_progress" / "celery_progress.js"))


def test_celery_progress_own_script_follows_a_job_to_its_end(stand_in):
    stand_in.holds_jobs = True
    job = generate.delay("a fox", num_inference_steps=40)
    url, page = f"/progress/{job.id}/", make_page()
    page.load(script_of_celery_progress())
    page.do(f"CeleryProgressBar.initProgressBar('{url}', {{onResult: (_, result) => seen = result}})", url)
    assert page.value("named('progress-bar-message').textContent") == "Waiting for task to start..."
    stand_in.jobs[0].progress(25)
    page.wait(url)
    assert page.value("named('progress-bar').style.width") == "25%"
    assert page.value("named('progress-bar-message').textContent") == "10 of 40 processed. denoising"
    stand_in.jobs[0].finish()
    page.wait(url)
    assert page.value("named('progress-bar').style.backgroundColor") == "#76ce60"
    assert page.value("seen.prompt") == "a fox"
    assert page.value("timers.length") == 0


@pytest.mark.parametrize(("end", "words"), [(lambda job: job.fail(GenerationFailed("the device failed")), "the device"),
                                            (lambda job: job.revoke(), "Task revoked")])  # fmt: skip
def test_celery_progress_own_script_says_why_there_is_no_image(stand_in, end, words):
    stand_in.holds_jobs = True
    job = generate.delay("a fox")
    end(stand_in.jobs[0])
    url, page = f"/progress/{job.id}/", make_page()
    page.load(script_of_celery_progress())
    options = "{resultElement: null, onTaskError: (bar, line, text) => seen = text}"
    page.do(f"CeleryProgressBar.initProgressBar('{url}', {options})", url)
    assert words in page.value("seen")


@pytest.fixture
def receiver() -> Iterator[None]:
    """Connect celery-progress' receiver to the ends of tasks: it stores `IGNORED` for those that Celery ignores."""
    from celery.signals import task_postrun
    from celery_progress.tasks import task_postrun_handler

    task_postrun.connect(task_postrun_handler)
    yield
    task_postrun.disconnect(task_postrun_handler)


def test_celery_progress_receiver_leaves_the_end_of_a_job_as_it_is(stand_in, receiver):
    stand_in.expire_next()
    group(generate.s("a fox"), generate.s("a bear")).delay()  # the first ends as an ignored task
    assert [job.result.state for job in stand_in.jobs] == ["REVOKED", "SUCCESS"]


# This package's own card


def test_a_card_follows_a_job_to_its_image(stand_in):
    stand_in.holds_jobs = True
    row = new_row()
    place, page = f"/v1/jobs/{row.task_id}", make_page()
    page.load(FILES / "words.js")
    page.load(CARD)
    page.do(f"var card = {{querySelector: named, dataset: {{sdtpuJob: '{place}'}}}}; watch(card)", place)
    assert page.value("named('.sdtpu-state').textContent") == "in the queue"
    stand_in.jobs[0].progress(40, preview=b"\x89PNG")
    page.wait(place)
    assert page.value("[named('progress').value, named('.sdtpu-state').textContent]") == [40, "40 %"]
    assert page.value("[named('img').src, named('img').hidden]") == ["data:image/png;base64,iVBORw==", False]
    stand_in.jobs[0].finish()
    page.wait(place)
    assert page.value("[named('img').src, named('img').hidden]") == [f"http://testserver{place}/image", False]
    assert page.value("[named('progress').value, named('.sdtpu-cancel').hidden, timers.length]") == [100, True, 0]


def test_a_card_cancels_its_job_with_the_token_and_says_why_there_is_no_image(stand_in):
    stand_in.holds_jobs = True
    row = new_row()
    place, page = f"/v1/jobs/{row.task_id}", make_page()
    page.load(FILES / "words.js")
    page.load(CARD)
    data = f"{{sdtpuJob: '{place}', sdtpuCsrf: 'a-token'}}"
    page.do(f"watch({{querySelector: named, dataset: {data}}})", place)
    page.do("listeners.click()", place, "DELETE", {"X-CSRFToken": "a-token"})
    assert page.value("named('.sdtpu-state').textContent") == "cancelled: revoked"
    page.wait(place)
    assert page.value("timers.length") == 0
    assert stand_in.jobs[0].result.state == "REVOKED"


def test_a_card_of_an_image_that_is_kept_asks_for_nothing(stand_in):
    page = make_page()
    page.load(FILES / "words.js")
    page.load(CARD)
    assert page.value("watch({querySelector: named, dataset: {sdtpuJob: '/x', sdtpuDone: ''}}) ?? timers.length") == 0
    assert page.value("asked.length") == 0


# django-celery-results


def test_a_row_follows_a_job_whose_results_django_celery_results_keeps(django_project):
    from django_celery_results.models import TaskResult

    from sdtpu_worker.contrib.django.models import GeneratedImage

    with client_app("memory://", "django-db", **IN_TEST) as app:
        row = new_row()
        app.backend.store_result(row.task_id, {"percent": 40}, "PROGRESS")
        row.refresh_status()
        assert row.status == "running"
        app.backend.store_result(row.task_id, GenerationFailed("the device failed"), "FAILURE")
        row.refresh_status()
    assert (row.status, row.error) == ("failed", "the device failed")
    assert TaskResult.objects.get(task_id=row.task_id).status == "FAILURE"
    assert GeneratedImage.objects.get(pk=row.pk).status == "failed"


def test_results_stay_in_django_celery_results_with_the_image_on_the_storage(django_project):
    from django_celery_results.models import TaskResult

    eager = {"task_always_eager": True, "task_store_eager_result": True}
    with client_app("memory://", "django-db", **IN_TEST, **eager) as app, without_devices():
        row = new_row()
        row.refresh_from_db()
        assert row.image.read().startswith(b"\x89PNG")
        assert app.AsyncResult(row.task_id).get()["prompt"] == "a fox"
    assert TaskResult.objects.get(task_id=row.task_id).status == "SUCCESS"


# django-storages


@pytest.fixture
def ftp(tmp_path: Path) -> Iterator[str]:
    """Run an FTP server on a free port of loopback; give the address of its folder."""
    authorizer = DummyAuthorizer()
    authorizer.add_user("shop", "secret", str(tmp_path), perm="elradfmwMT")
    handler = type("Handler", (FTPHandler,), {"authorizer": authorizer})
    server = FTPServer(("127.0.0.1", 0), handler)
    stopping = threading.Event()

    def serve() -> None:
        while not stopping.is_set():
            server.serve_forever(timeout=0.05, blocking=False, handle_exit=False)

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"ftp://shop:secret@127.0.0.1:{server.address[1]}/"
    stopping.set()
    thread.join()
    server.close_all()


def test_images_go_to_a_storage_of_django_storages(stand_in, ftp, tmp_path):
    from django.core.files.storage import storages
    from django.test import override_settings

    backend = {"BACKEND": "storages.backends.ftp.FTPStorage", "OPTIONS": {"location": ftp}}
    static = {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"}
    with override_settings(STORAGES={"default": backend, "staticfiles": static}):
        row = new_row()
        row.refresh_from_db()
        assert row.status == "succeeded"
        (stored,) = tmp_path.rglob("*.png")
        assert stored.name == f"{row.task_id}.png"
        assert row.image.read() == stored.read_bytes()
        assert row.image.url == f"/media/{row.image.name}"
        storages["default"].disconnect()
