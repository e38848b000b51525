"""How the process of a device worker ends where Celery would go on: its devices are lost, or its threads do not end."""

from __future__ import annotations

import logging
import os
import threading
import time

from celery.worker import state

logger = logging.getLogger(__name__)

EX_ENGINE_LOST = 75
"""Exit code of a worker whose devices are lost (EX_TEMPFAIL): its supervisor should start it anew."""
_LEAVE_AFTER_S = 5.0


def end_process() -> None:
    """Have Celery end the worker with a code of its own, for its supervisor to start it anew on healthy devices."""
    state.should_stop = EX_ENGINE_LOST


def leave_soon() -> None:
    """Have the process leave in a few seconds, without the threads that do not end (a driver waits for a network)."""
    logger.critical("some threads do not end; the process leaves without them in %.0f s", _LEAVE_AFTER_S)
    threading.Thread(target=_leave, name="sdtpu-leave", daemon=True).start()


def _leave() -> None:
    time.sleep(_LEAVE_AFTER_S)
    os._exit(1)
