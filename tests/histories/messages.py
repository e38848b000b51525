"""The messages of a history: those of clients, and those among workers."""

from __future__ import annotations

import json
from base64 import b64encode
from datetime import UTC, datetime

TASK, QUEUE = "sdtpu.generate", "sdtpu"
LIST = QUEUE + "\x06\x166"
"""The list of the queue's band for jobs without a priority."""
REPLIES, REPLY = "an-id.reply.celery.pidbox", {"revoked": {}}
"""A queue over which one worker process answers another one, and an answer."""
_BODY = b64encode(b'[["x"], {"seed": 1}, {}]').decode()


def job_message(task_id: str, due_at: float | None, expires_at: float | None = None) -> str:
    """Return a message of Celery's protocol 2.

    Args:
        task_id: the job.
        due_at: its `eta`, in seconds since 1970; None for none.
        expires_at: its `expires`, likewise.
    """
    headers = {"lang": "py", "task": TASK, "id": task_id, "root_id": task_id}
    for name, at in (("eta", due_at), ("expires", expires_at)):
        if at is not None:
            headers[name] = datetime.fromtimestamp(at, UTC).isoformat()
    properties = {
        "correlation_id": task_id, "delivery_tag": task_id, "body_encoding": "base64", "priority": 6,
        "delivery_mode": 2, "delivery_info": {"exchange": "", "routing_key": QUEUE},
    }  # fmt: skip
    message = {
        "body": _BODY, "content-encoding": "utf-8", "content-type": "application/json", "headers": headers,
        "properties": properties,
    }  # fmt: skip
    return json.dumps(message)


def reply_message() -> str:
    """Return a message with which a worker process answers another one."""
    properties = {"delivery_tag": "1", "delivery_info": {"exchange": "", "routing_key": REPLIES}}
    message = {
        "body": json.dumps(REPLY), "content-encoding": "utf-8", "content-type": "application/json", "headers": {},
        "properties": properties,
    }  # fmt: skip
    return json.dumps(message)
