"""A Django project inside the test process: its settings, its URLs, its database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.http import HttpRequest
from django.urls import URLPattern, URLResolver

urlpatterns: list[URLPattern | URLResolver] = []


def find_owner(request: HttpRequest) -> str | None:
    """Return whom a test says that it is; with no name, the user or the session."""
    from sdtpu_worker.web.owners import owner_in_session

    if (name := request.headers.get("X-User")) is not None:
        return name or None
    return f"user-{request.user.pk}" if request.user.is_authenticated else owner_in_session(request.session)


def configure(folder: Path) -> None:
    """Set the project up in this process, with an empty database in a folder; a second call changes nothing."""
    import django
    from django.conf import settings
    from django.core.management import call_command
    from django.urls import include, path

    if settings.configured:
        return
    settings.configure(
        SECRET_KEY="for tests only",
        ALLOWED_HOSTS=["testserver", "localhost"],
        ROOT_URLCONF=__name__,
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(folder / "site.sqlite3")}},
        INSTALLED_APPS=[
            "django.contrib.admin", "django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions",
            "django.contrib.messages", "django.contrib.staticfiles", "django_celery_results", "celery_progress",
            "sdtpu_worker.contrib.django",
        ],
        MIDDLEWARE=[
            "django.contrib.sessions.middleware.SessionMiddleware", "django.middleware.common.CommonMiddleware",
            "django.middleware.csrf.CsrfViewMiddleware", "django.contrib.auth.middleware.AuthenticationMiddleware",
            "django.contrib.messages.middleware.MessageMiddleware",
        ],
        TEMPLATES=[
            {
                "BACKEND": "django.template.backends.django.DjangoTemplates",
                "APP_DIRS": True,
                "OPTIONS": {
                    "context_processors": [
                        "django.template.context_processors.request", "django.contrib.auth.context_processors.auth",
                        "django.contrib.messages.context_processors.messages",
                    ]
                },
            }
        ],
        STATIC_URL="/static/",
        MEDIA_URL="/media/",
        MEDIA_ROOT=str(folder / "media"),
        USE_TZ=True,
    )  # fmt: skip
    django.setup()
    from django.contrib import admin

    urlpatterns.extend(
        [
            path("v1/", include("sdtpu_worker.contrib.django.urls")),
            path("admin/", admin.site.urls),
            path("progress/", include("celery_progress.urls")),
        ]
    )
    call_command("migrate", verbosity=0)


def forget_connections() -> None:
    """Have the jobs API open new connections, as the Celery app has changed."""
    from django.apps import apps

    config: Any = apps.get_app_config("sdtpu")
    if (front := vars(config).pop("front", None)) is not None:
        front.close()
