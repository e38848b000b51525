"""What Celery shows of an app's settings (`celery inspect conf`, `celery report`, Flower): the values in force, without
the passwords of URLs. The environment goes before the configuration, and Celery would show the latter.

Celery masks settings by their names. It does not know the settings of this package or, with Django's
`namespace="CELERY"`, its own `CELERY_BROKER_URL`; and any other setting may hold a URL too.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.app.utils import Settings

from sdtpu_worker.redaction import without_passwords
from sdtpu_worker.settings_table import SETTINGS


class GuardedSettings(Settings):
    """Celery's settings, with the environment's values, and without passwords in the censored table."""

    def table(self, with_defaults: bool = False, censored: bool = True) -> dict[str, Any]:
        """Return the settings that are in force, with passwords masked; with `censored=False` as they are."""
        table = super().table(with_defaults, censored)
        return without_passwords({**table, **self._from_environment()}) if censored else table

    def _from_environment(self) -> dict[str, Any]:
        """Return what the environment says in place of the configuration, under the names that this has."""
        names = {setting.name: setting.name.upper() for setting in SETTINGS}
        names |= {name: f"CELERY_{name.upper()}" for name in ("broker_url", "result_backend")}
        return {
            f"{self.prefix}{name.upper()}" if self.prefix else name: os.environ[variable]
            for name, variable in names.items()
            if variable in os.environ
        }


def guard_settings(app: Celery) -> None:
    """Mask the passwords of URLs where an app shows its settings, also if its configuration loads later."""

    def guard(source: Any, **_: Any) -> None:
        if type(source) is Settings:
            object.__setattr__(source, "__class__", GuardedSettings)  # an ordinary assignment would add a setting

    guard(app.conf)
    app.on_after_configure.connect(guard, weak=False)
