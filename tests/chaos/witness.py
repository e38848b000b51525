"""A client that sees every result at the moment when it is stored, also one that another replaces."""

from __future__ import annotations

import hashlib
import json
import threading
from types import TracebackType
from typing import Any

import redis

_PREFIX = b"celery-task-meta-"
READY = ("SUCCESS", "FAILURE", "REVOKED")


class Witness:
    """Listens to what Celery publishes with every result that it stores.

    Attributes:
        ends: by task id, every end that was ever visible, in order: the state and a digest of the result and of the
            image that it named.
    """

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url)
        self._pubsub = self._client.pubsub(ignore_subscribe_messages=True)
        self._thread = threading.Thread(target=self._listen, name="witness", daemon=True)
        self._closing = threading.Event()
        self.ends: dict[str, list[tuple[str, str]]] = {}
        self.relapsed: set[str] = set()
        """Jobs that were seen as not done after they had been done."""

    def __enter__(self) -> Witness:
        self._pubsub.psubscribe(_PREFIX + b"*")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._closing.set()
        self._thread.join(60)
        self._pubsub.close()
        self._client.close()

    def changed(self) -> set[str]:
        """Return the jobs that were not done once and for all."""
        return self.relapsed | {task_id for task_id, ends in self.ends.items() if len(ends) > 1}

    def different_images(self) -> set[str]:
        """Return the jobs whose image is not the one any more that their result named at first."""
        now = {task_id: self._image_digest(task_id) for task_id, ends in self.ends.items() if ends[0][0] == "SUCCESS"}
        return {task_id for task_id, digest in now.items() if not self.ends[task_id][0][1].endswith(digest)}

    def _listen(self) -> None:
        while not self._closing.is_set():
            message: Any = self._pubsub.get_message(timeout=0.2)
            if message is not None and message["type"] == "pmessage":
                self._see(message["channel"].removeprefix(_PREFIX).decode(), json.loads(message["data"]))

    def _see(self, task_id: str, meta: dict[str, Any]) -> None:
        if meta["status"] in READY:
            result = hashlib.sha256(json.dumps(meta["result"]).encode()).hexdigest()
            self.ends.setdefault(task_id, []).append((meta["status"], result + self._image_digest(task_id)))
        elif task_id in self.ends:
            self.relapsed.add(task_id)

    def _image_digest(self, task_id: str) -> str:
        data: Any = self._client.get(f"sdtpu:image:{task_id}")
        return hashlib.sha256(data or b"").hexdigest()
