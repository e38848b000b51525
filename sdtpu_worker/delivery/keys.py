"""The names of the Redis keys that hold messages, leases, dead letters, what is kept of a job, and what is reused."""

from __future__ import annotations

from dataclasses import dataclass

from sdtpu_worker.contract.queues import DEAD_COUNTS_KEY, DELAYED_KEY, HELD_KEY, LEASES_KEY


@dataclass(frozen=True)
class Keys:
    """The key names of one broker; `prefix` is kombu's `global_keyprefix` and stands before each of them."""

    prefix: str = ""

    @property
    def held(self) -> str:
        """A hash of the held and the deferred messages, by tag: the name of its list, a line feed, the message."""
        return f"{self.prefix}{HELD_KEY}"

    @property
    def leases(self) -> str:
        """A sorted set of the tags of held messages, by the time (seconds since 1970) at which the lease expires."""
        return f"{self.prefix}{LEASES_KEY}"

    @property
    def delayed(self) -> str:
        """A sorted set of the tags of deferred messages, by the time (seconds since 1970) at which they are due."""
        return f"{self.prefix}{DELAYED_KEY}"

    @property
    def dead(self) -> str:
        """A list of the last dead letters, the newest first: JSON with the message's beginning and the reason."""
        return f"{self.prefix}sdtpu:dead"

    @property
    def dead_counts(self) -> str:
        """A hash of how many messages were dead-lettered, by the name of the error."""
        return f"{self.prefix}{DEAD_COUNTS_KEY}"

    def starts(self, task_id: str) -> str:
        """A list of the worker processes on whose devices a job was: each a host name, a line feed and a UUID."""
        return f"{self.prefix}sdtpu:starts:{task_id}"

    def snapshot(self, task_id: str) -> str:
        """A string: the snapshot of a job that was handed over."""
        return f"{self.prefix}sdtpu:snap:{task_id}"

    def pointer(self, reuse_key: str) -> str:
        """A string: which task's stored image answers jobs with this reuse key; see `sdtpu_worker.reuse`."""
        return f"{self.prefix}sdtpu:reuse:{reuse_key}"

    def lead(self, reuse_key: str) -> str:
        """A string: the job that draws its image for all that have this reuse key."""
        return f"{self.prefix}sdtpu:reuse:{reuse_key}:lead"
