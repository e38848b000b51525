"""The same page in a Flask app and in a Django project, with their users and their protection from forged requests."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask
from playwright.sync_api import expect
from werkzeug.serving import make_server

from sdtpu_worker.contrib.flask import create_blueprint
from tests.page.browser import WAIT_MS
from tests.web import django_site

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow, pytest.mark.usefixtures("worker")]

RING = "a white ring on a purple background"


@pytest.fixture
def app_conf() -> dict[str, Any]:
    """Switch the page on, and let sessions tell callers apart."""
    return {"sdtpu_web_page": True}


@pytest.fixture
def flask_url(app: Any) -> Iterator[str]:
    """Serve a Flask app with the blueprint under a name of its own."""
    site = Flask(__name__)
    site.secret_key = "for tests only"
    blueprint = create_blueprint(app, url_prefix="/studio/api")
    site.register_blueprint(blueprint)
    with site.test_request_context():
        path = site.url_for("sdtpu.page")
    yield from serve(site, path)
    blueprint.close()


@pytest.fixture
def django_url(app: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a Django project."""
    with ThreadPoolExecutor(1) as thread:  # this one has the event loop of Chromium's driver, which Django minds
        thread.submit(django_site.configure, tmp_path_factory.mktemp("site")).result()
    from django.core.wsgi import get_wsgi_application
    from django.urls import reverse

    yield from serve(get_wsgi_application(), reverse("sdtpu:page"))
    django_site.forget_connections()


def serve(site: Any, path: str) -> Iterator[str]:
    server = make_server("127.0.0.1", 0, site, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://localhost:{server.server_port}{path}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("front", ["flask", "django"])
def test_a_web_app_shows_the_page_to_its_own_users(front, request, visit):
    url = request.getfixturevalue(f"{front}_url")
    visitor = visit(url)
    visitor.wait_until_live()
    card = visitor.make(RING, num_inference_steps="600")
    expect(card.locator(".state")).to_have_text(re.compile(r"\d+ %"), timeout=WAIT_MS)
    expect(card.locator("img.picture")).to_have_attribute("src", re.compile("^data:image/png"), timeout=WAIT_MS)
    expect(card.locator(".state")).to_have_text(re.compile("drawn in"), timeout=WAIT_MS)
    visitor.page.reload()
    expect(card.locator("img.done")).to_be_visible(timeout=WAIT_MS)
    visitor.make(RING, num_inference_steps="1000")
    card.get_by_text("Cancel").click()
    expect(card.locator(".state")).to_have_text("Cancelled", timeout=WAIT_MS)
    visitor.check(state=f"in-{front}")
    other = visit(url)
    other.wait_until_live()
    expect(other.page.locator("#empty")).to_be_visible()
    expect(other.page.locator(".card")).to_have_count(0)


@pytest.mark.parametrize("app_conf", [{"sdtpu_web_page": True, "sdtpu_web_max_streams": 0}])
def test_a_page_that_gets_no_stream_shows_the_picture_forming_too(flask_url, visit):
    visitor = visit(flask_url)
    visitor.wait_until_live()
    card = visitor.make(RING, num_inference_steps="1000")
    picture = card.locator("img.picture")
    expect(picture).to_have_attribute("src", re.compile("^data:image/png"), timeout=WAIT_MS)
    first = picture.get_attribute("src")
    expect(picture).not_to_have_attribute("src", first, timeout=WAIT_MS)
    own = visitor.page.locator(".slot[data-kind=own]")
    expect(own).to_have_attribute("style", re.compile("data:image/png"), timeout=WAIT_MS)
    card.get_by_text("Cancel").click()
    expect(card.locator(".state")).to_have_text("Cancelled", timeout=WAIT_MS)
