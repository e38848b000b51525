"""The private names of Celery, kombu and redis-py that this package leans on: what to look at when they change.

Their public interfaces offer no other way to claim, hold and requeue messages as `delivery/` does, or to end a job in
Celery's own way. `tests/unit/test_private_api.py` checks that each name is there in the installed versions, and that
the package uses no others. `pyproject.toml` bounds the versions for the worker.
"""

from __future__ import annotations

from typing import NamedTuple


class PrivateName(NamedTuple):
    """A private name: the class or module that has it (`module:Class` or `module`), and what it is used for."""

    owner: str
    name: str
    used_for: str


PRIVATE_NAMES = (
    # Claiming: `delivery/transport.py` replaces kombu's blocking pop by a script.
    PrivateName("kombu.transport", "_transport_cache", "kombu resolves a transport's alias anew"),
    PrivateName("kombu.transport.redis:Channel", "_brpop_start", "replaced: sends a claim"),
    PrivateName("kombu.transport.redis:Channel", "_brpop_read", "replaced: reads what a claim brought"),
    PrivateName("kombu.transport.redis:Channel", "_brpop_sent_at", "kombu notices a reply that is long due"),
    PrivateName("kombu.transport.redis:Channel", "_in_poll", "kombu knows that a reply is due"),
    PrivateName("kombu.transport.redis:Channel", "_flush_brpop_reauth", "credentials that were renewed meanwhile"),
    PrivateName("kombu.transport.redis:Channel", "_receive_one", "extended: a bad fanout message ends nothing"),
    PrivateName("kombu.transport.redis:Channel", "_q_for_pri", "the list of a queue's band"),
    PrivateName("kombu.transport.redis:Channel", "_queue_cycle", "queues are served in turn"),
    PrivateName(
        "kombu.transport.redis:Channel", "_closing", "a message that comes while the channel closes is requeued"
    ),
    PrivateName("kombu.transport.virtual:Transport", "_callbacks", "the queues that are consumed"),
    PrivateName("kombu.transport.virtual:Transport", "_deliver", "hands a checked message to Celery"),
    # Waking up: `delivery/wake_up.py` adds a connection to kombu's poller.
    PrivateName("kombu.transport.redis:MultiChannelPoller", "_fd_to_chan", "whose connection became readable"),
    PrivateName("kombu.transport.redis:MultiChannelPoller", "_chan_to_sock", "connections that are given up with it"),
    PrivateName("kombu.transport.redis:MultiChannelPoller", "_unregister_from_poll", "a connection that was given up"),
    PrivateName("kombu.transport.redis:MultiChannelPoller", "_pause_brpop", "the reply of a claim is read at once"),
    PrivateName("kombu.transport.redis:MultiChannelPoller", "_channels", "one channel restores what kombu popped"),
    PrivateName("redis.connection:Connection", "_sock", "the socket that the event loop watches"),
    # Jobs: `worker/` ends them as Celery does.
    PrivateName("celery.worker.request:Request", "_on_ack", "replaced: acknowledges from the job's own thread"),
    PrivateName("celery.worker.request:Request", "_on_reject", "replaced: requeues from the job's own thread"),
    PrivateName("celery.worker.request:Request", "_already_revoked", "the job's end is announced"),
    PrivateName("celery.worker.request:Request", "_announce_revoked", "the job's own thread announces the revoke"),
    PrivateName("celery.worker.request:Request", "_context", "a job that is done already is counted in its chord"),
    PrivateName("celery.concurrency.base:BasePool", "_get_info", "extended: what `inspect stats` shows of the pool"),
    PrivateName("celery.backends.base:Backend", "_get_result_meta", "a running job's state, as Celery stores it"),
    # Apps: `plugin.py` and `images/store.py` find them.
    PrivateName("celery.app.amqp:Queues", "_consume_from", "whether -Q chose the queues"),
    PrivateName("celery:Celery", "_backend_cache", "shared by a device worker's threads; in memory in tests"),
    PrivateName("celery:Celery", "_get_backend", "the one that they share"),
    PrivateName("celery", "_state", "whether there is a default app"),
    PrivateName("celery.backends.redis:SentinelBackend", "_transport_options", "how the door reaches the sentinels"),
    PrivateName("celery.local:Proxy", "_get_current_object", "the app behind `current_app`"),
)
