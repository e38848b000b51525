"""No passwords of URLs where Celery shows an app's settings: `celery inspect conf`, `celery report`, Flower.

Celery censors settings by their names. It knows neither this package's nor, with Django's `namespace="CELERY"`, its own
`CELERY_BROKER_URL`; and any setting may hold a URL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery import Celery
from celery.app.utils import Settings

from sdtpu_worker.redaction import sanitize_url


class GuardedSettings(Settings):
    """Celery's settings, whose censored table has no URL with a password, under whatever name."""

    def table(self, with_defaults: bool = False, censored: bool = True) -> dict[str, Any]:
        """Return the settings as they may be shown; with `censored=False` as they are."""
        table = super().table(with_defaults, censored)
        return _without_passwords(table) if censored else table


def guard_settings(app: Celery) -> None:
    """Let an app show its settings without the passwords of URLs, whenever its configuration loads."""

    def guard(source: Any, **_: Any) -> None:
        if type(source) is Settings:
            object.__setattr__(source, "__class__", GuardedSettings)  # an ordinary assignment would add a setting

    guard(app.conf)
    app.on_after_configure.connect(guard, weak=False)


def _without_passwords(value: Any) -> Any:
    if isinstance(value, str):
        return sanitize_url(value)
    if isinstance(value, Mapping):
        return {key: _without_passwords(part) for key, part in value.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(_without_passwords, value))
    return value
