"""The fake worker of `tests.http.preview_worker`, with the database of the test's Django project for its results."""

from __future__ import annotations

import os
from pathlib import Path

from tests.http.preview_worker import FakeDevicePool, app
from tests.web import django_site

__all__ = ["FakeDevicePool", "app"]

django_site.configure(Path(os.environ["DJANGO_SITE_FOLDER"]))
