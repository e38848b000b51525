"""Masks the passwords of URLs where Celery shows an app's settings: `celery inspect conf`, `celery report`, Flower.

Celery masks settings by their names. It does not know the settings of this package or, with Django's
`namespace="CELERY"`, its own `CELERY_BROKER_URL`; and any other setting may hold a URL too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery import Celery
from celery.app.utils import Settings

from sdtpu_worker.redaction import sanitize_url


class GuardedSettings(Settings):
    """Celery's settings, with the passwords of URLs masked in the censored table, whatever the setting's name is."""

    def table(self, with_defaults: bool = False, censored: bool = True) -> dict[str, Any]:
        """Return the settings with passwords masked; with `censored=False` as they are."""
        table = super().table(with_defaults, censored)
        return _without_passwords(table) if censored else table


def guard_settings(app: Celery) -> None:
    """Mask the passwords of URLs where an app shows its settings, also if its configuration loads later."""

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
