"""The Django app: migrations, checks, kept images, admin, template tag, CSRF, sessions, ASGI."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from celery.contrib.testing.worker import start_worker

from sdtpu_worker import GenerationFailed, InvalidRequest, QueueFull
from sdtpu_worker.testing import StandInWorker, stand_in_worker
from tests.http.doors import read_events
from tests.support.logs import logging_kept
from tests.support.waiting import wait_until

pytestmark = pytest.mark.usefixtures("site", "clean_rows")


@pytest.fixture
def clean_rows(django_project: None) -> Iterator[None]:
    """Leave no row."""
    yield
    from sdtpu_worker.contrib.django.models import GeneratedImage

    GeneratedImage.objects.all().delete()


@pytest.fixture
def stand_in(app: Any) -> Iterator[StandInWorker]:
    """Take the jobs of the project, and run what follows them at once."""
    app.conf.task_always_eager = True
    with stand_in_worker(app) as worker:
        yield worker


def images() -> Any:
    from sdtpu_worker.contrib.django.models import GeneratedImage

    return GeneratedImage.objects


def client(**options: Any) -> Any:
    from django.test import Client

    return Client(**options)


def check_ids() -> list[str]:
    from sdtpu_worker.contrib.django.checks import check_project

    return [message.id for message in check_project()]


# The project


def test_the_migrations_are_complete(capsys):
    from django.core.management import call_command

    call_command("makemigrations", "--check", "--dry-run", "sdtpu")
    assert "No changes detected" in capsys.readouterr().out


def test_check_finds_nothing_in_a_good_project():
    from django.core.management import call_command

    call_command("check", fail_level="WARNING")


def test_check_names_what_is_wrong_and_what_to_do(app, settings_changed):
    app.conf.sdtpu_web_max_jobs = "many"
    assert check_ids() == ["sdtpu.E002"]
    app.conf.sdtpu_web_max_jobs = None
    app.conf.sdtpu_web_owner = "tests.web.nowhere.find"
    assert check_ids() == ["sdtpu.E003"]
    app.conf.sdtpu_web_owner = None
    with settings_changed(MIDDLEWARE=[]):
        assert check_ids() == ["sdtpu.W002"]


def test_check_says_that_the_jobs_api_needs_redis():
    from tests.support.clients import client_app

    with client_app("memory://", "django-db", sdtpu_web_owner="tests.web.django_site.find_owner"):
        assert check_ids() == ["sdtpu.W001"]


def test_check_says_where_the_celery_app_is_missing():
    from celery import Celery

    from tests.support.clients import client_app

    with client_app("memory://", "cache+memory://"), Celery("another", set_as_current=True):
        assert check_ids() == ["sdtpu.E001"]


@pytest.fixture
def settings_changed() -> Any:
    from django.test import override_settings

    return override_settings


# Kept images


def test_a_job_is_sent_at_the_commit_and_its_image_kept(stand_in):
    from django.db import transaction

    with transaction.atomic():
        row = images().generate("a fox", owner="user-7", seed=3, options={"priority": 7})
        assert stand_in.jobs == []
    (job,) = stand_in.jobs
    assert (job.id, job.parameters["seed"], job.options["priority"]) == (row.task_id, 3, 7)
    row.refresh_from_db()
    assert (row.status, row.owner, row.prompt, row.has_ended) == ("succeeded", "user-7", "a fox", True)
    assert row.image.name.endswith(f"{row.task_id}.png")
    assert row.image.read().startswith(b"\x89PNG")
    assert row.result["seed"] == 3
    assert str(row) == "a fox (succeeded)"


def test_a_rolled_back_transaction_sends_nothing(stand_in):
    from django.db import transaction

    with transaction.atomic():
        images().generate("a fox")
        transaction.set_rollback(True)
    assert (stand_in.jobs, images().count()) == ([], 0)


def test_a_refused_job_has_no_row(stand_in):
    with pytest.raises(InvalidRequest):
        images().generate(" ")
    stand_in.refuse_next(QueueFull("full"))
    with pytest.raises(QueueFull):
        images().generate("a fox")
    assert images().count() == 0


def test_a_failure_is_kept_with_its_reason(stand_in):
    stand_in.fail_next(GenerationFailed("the device failed"))
    row = images().generate("a fox")
    row.refresh_from_db()
    assert (row.status, row.error) == ("failed", "the device failed")


def test_a_row_follows_its_job_and_can_cancel_it(stand_in):
    stand_in.holds_jobs = True
    row = images().generate("a fox")
    row.refresh_status()
    assert row.status == "queued"
    stand_in.jobs[0].progress(40)
    row.refresh_status()
    assert row.status == "running"
    row.cancel()
    row.refresh_from_db()
    assert row.status == "cancelled"
    assert stand_in.jobs[0].result.state == "REVOKED"


def test_a_job_of_the_jobs_api_has_a_row_and_a_row_is_a_job_of_the_jobs_api(stand_in):
    ann = client(headers={"X-User": "ann"})
    made = ann.post("/v1/jobs", {"prompt": "a fox"}, content_type="application/json")
    assert made.status_code == 202
    row = images().get(task_id=made.json()["id"])
    assert (row.owner, row.status) == ("ann", "succeeded")
    other = images().generate("a bear", owner="ann")
    shown = ann.get(f"/v1/jobs/{other.task_id}").json()
    assert (shown["status"], shown["parameters"]["prompt"]) == ("succeeded", "a bear")
    assert client(headers={"X-User": "bob"}).get(f"/v1/jobs/{other.task_id}").status_code == 404
    stand_in.refuse_next(QueueFull("full", 3.0))
    assert ann.post("/v1/jobs", {"prompt": "a fox"}, content_type="application/json").status_code == 429
    assert images().count() == 2


def test_an_image_reaches_the_storage_by_way_of_an_ordinary_worker(app, worker):
    app.conf.task_default_queue = "website"
    app.loader.import_default_modules()
    made = client(headers={"X-User": "ann"}).post(
        "/v1/jobs", {"prompt": "a fox", "num_inference_steps": 2}, content_type="application/json"
    )
    failed = images().generate("nan", num_inference_steps=2)
    with logging_kept(), start_worker(app, perform_ping_check=False, shutdown_timeout=60, queues=["website"]):
        rows = [images().get(task_id=task_id) for task_id in (made.json()["id"], failed.task_id)]

        def are_done() -> bool:
            for row in rows:
                row.refresh_from_db()
            return all(row.has_ended for row in rows)

        wait_until(are_done, "both rows to be filled")
    assert [row.status for row in rows] == ["succeeded", "failed"]
    assert rows[0].image.read().startswith(b"\x89PNG")


# The admin


@pytest.fixture
def admin() -> Any:
    from django.contrib.auth.models import User

    user = User.objects.create_superuser("root")
    visitor = client()
    visitor.force_login(user)
    yield visitor
    user.delete()


def test_the_admin_shows_thumbnails_and_cancels_jobs(admin, stand_in):
    done = images().generate("a fox & a bear")
    stand_in.holds_jobs = True
    waiting = images().generate("a cat")
    done.refresh_from_db()
    page = admin.get("/admin/sdtpu/generatedimage/").content.decode()
    assert f'<img src="{done.image.url}" alt="a fox &amp; a bear"' in page
    change = {"action": "cancel_jobs", "_selected_action": [done.pk, waiting.pk]}
    answer = admin.post("/admin/sdtpu/generatedimage/", change, follow=True)
    assert "1 jobs were cancelled" in answer.content.decode()
    waiting.refresh_from_db()
    assert waiting.status == "cancelled"
    assert done.image.url in admin.get(f"/admin/sdtpu/generatedimage/{done.pk}/change/").content.decode()
    assert admin.get("/admin/sdtpu/generatedimage/add/").status_code == 403


def test_the_admin_looks_what_has_become_of_jobs(admin, stand_in):
    stand_in.holds_jobs = True
    row = images().generate("a fox")
    stand_in.jobs[0].expire()
    admin.post("/admin/sdtpu/generatedimage/", {"action": "refresh_jobs", "_selected_action": [row.pk]})
    row.refresh_from_db()
    assert (row.status, row.error) == ("cancelled", "expired")


# The template tag


def render(text: str, **context: Any) -> str:
    from django.template import Context, Template

    return Template("{% load sdtpu %}" + text).render(Context(context))


def test_a_card_shows_a_job_that_waits_and_one_that_is_done(stand_in):
    done = images().generate("a <fox>")
    stand_in.holds_jobs = True
    waiting = images().generate("a bear")
    done.refresh_from_db()
    card = render("{% sdtpu_card image %}", image=done)
    assert f'<img src="{done.image.url}" alt="a &lt;fox&gt;">' in card
    card = render("{% sdtpu_card image live=True %}", image=waiting, csrf_token="a-token")
    assert f'data-sdtpu-job="/v1/jobs/{waiting.task_id}" data-sdtpu-live data-sdtpu-csrf="a-token"' in card
    assert 'role="status">queued<' in card
    assert f"/v1/jobs/{waiting.task_id}" in render("{% sdtpu_card id %}", id=waiting.task_id)


def test_the_script_and_the_style_sheet_of_the_cards_come_with_what_they_import():
    paths = re.findall(r'"(/v1/jobs/page/[^"]+)"', render("{% sdtpu_media %}"))
    assert [path.rpartition("/")[2] for path in paths] == ["card-on-a-page.css", "card-on-a-page.js"]
    paths += [f"/v1/jobs/page/{name}" for name in re.findall(r'from "\./(.+)"', client().get(paths[1]).text)]
    assert [client().get(path).status_code for path in paths] == [200, 200, 200]


# Django's own rules


def test_a_request_needs_the_csrf_token(stand_in):
    visitor = client(enforce_csrf_checks=True, headers={"X-User": "ann"})
    body = {"prompt": "a fox"}
    assert visitor.post("/v1/jobs", body, content_type="application/json").status_code == 403
    assert images().count() == 0
    visitor.cookies["csrftoken"] = token = "a" * 32
    made = visitor.post("/v1/jobs", body, content_type="application/json", headers={"X-CSRFToken": token})
    assert made.status_code == 202
    place = made.json()["links"]["self"]
    assert visitor.delete(place).status_code == 403
    assert visitor.delete(place, headers={"X-CSRFToken": token}).status_code == 200


def test_sessions_and_users_are_callers_of_their_own(app, stand_in):
    from django.contrib.auth.models import User

    app.conf.sdtpu_web_owner = None
    ann, stranger, user = client(), client(), client()
    account = User.objects.create_user("ann")
    user.force_login(account)
    places = [
        each.post("/v1/jobs", {"prompt": "a fox"}, content_type="application/json").json()["links"]["self"]
        for each in (ann, stranger, user)
    ]
    for each, own in zip((ann, stranger, user), places, strict=True):
        assert [each.get(place).status_code for place in places] == [200 if place == own else 404 for place in places]
    assert images().filter(owner=f"user-{account.pk}").count() == 1
    account.delete()


def test_a_user_may_have_so_many_unfinished_jobs_and_no_urgent_ones(app, stand_in):
    app.conf.sdtpu_web_priorities = "6-9"
    app.conf.sdtpu_web_max_jobs = 2
    stand_in.holds_jobs = True
    ann = client(headers={"X-User": "ann"})

    def post(**more: Any) -> Any:
        return ann.post("/v1/jobs", {"prompt": "a fox", **more}, content_type="application/json")

    assert "priority must be an integer from 6" in post(priority=5).json()["detail"]
    assert [post().status_code for _ in range(3)] == [202, 202, 429]


def test_a_database_transaction_of_the_request_holds_the_row_back_but_not_the_job(stand_in, settings_changed):
    with settings_changed(ATOMIC_REQUESTS=True):
        made = client(headers={"X-User": "ann"}).post("/v1/jobs", {"prompt": "a"}, content_type="application/json")
    assert made.status_code == 202
    assert images().get(task_id=made.json()["id"]).status == "succeeded"


def test_a_caller_with_limits_of_its_own_and_a_row_have_one_name(app, stand_in, monkeypatch):
    from django.core.exceptions import PermissionDenied
    from django.test import RequestFactory

    from sdtpu_worker.contrib.django.owners import owner_name
    from sdtpu_worker.web.caller import Caller
    from tests.web import django_site

    monkeypatch.setattr(django_site, "find_owner", lambda request: Caller("x" * 200, (3, 4), 1))
    stand_in.holds_jobs = True
    visitor, name = client(), owner_name(RequestFactory().get("/"))
    made = visitor.post("/v1/jobs", {"prompt": "a", "priority": 3}, content_type="application/json")
    assert images().get(task_id=made.json()["id"]).owner == name
    assert visitor.post("/v1/jobs", {"prompt": "a"}, content_type="application/json").status_code == 429
    row = images().generate("a fox", owner=name)
    assert visitor.get(f"/v1/jobs/{row.task_id}").status_code == 200
    monkeypatch.setattr(django_site, "find_owner", lambda request: None)
    with pytest.raises(PermissionDenied, match="log in first"):
        owner_name(RequestFactory().get("/"))


# ASGI


def test_under_asgi_more_streams_are_open_than_there_are_threads_for_them(app, stand_in):
    from django.core.handlers.asgi import ASGIHandler

    app.conf.sdtpu_web_max_streams = 0
    stand_in.holds_jobs = True
    row = images().generate("a fox", owner="ann")

    async def listen(visitor: httpx.AsyncClient) -> list[Any]:
        answer = await visitor.get(f"/v1/jobs/{row.task_id}/events", headers={"X-User": "ann"}, timeout=60)
        assert answer.headers["content-type"] == "text/event-stream"
        return list(read_events(answer.text.splitlines()))

    async def run() -> list[list[Any]]:
        transport = httpx.ASGITransport(ASGIHandler())
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as visitor:
            listening = [asyncio.create_task(listen(visitor)) for _ in range(12)]
            from django.apps import apps

            front: Any = apps.get_app_config("sdtpu").front
            while not (front._running and front._running.service.open_streams == 12):
                await asyncio.sleep(0.02)
            await asyncio.to_thread(stand_in.jobs[0].finish)
            return await asyncio.gather(*listening)

    streams = asyncio.run(run())
    assert [events[-1].data["status"] for events in streams] == ["succeeded"] * 12
    full = client(headers={"X-User": "ann"}).get(f"/v1/jobs/{row.task_id}/events")
    assert (full.status_code, json.loads(full.content)["code"]) == (503, "TooManyStreams")


def test_a_stream_of_a_wsgi_server_frees_its_thread_after_a_while(app, stand_in):
    app.conf.sdtpu_web_stream_s = 4
    stand_in.holds_jobs = True
    row = images().generate("a fox", owner="ann")
    ann = client(headers={"X-User": "ann"})
    for _ in range(2):
        answer = ann.get(f"/v1/jobs/{row.task_id}/events")
        events = list(read_events(answer.getvalue().decode().splitlines()))
        assert [event.name for event in events] == ["progress"]
