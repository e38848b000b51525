"""Start-up checks of a Redis server: what its version and configuration may do to jobs, and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from redis.exceptions import AskError, ClusterCrossSlotError, ClusterDownError, ResponseError

from sdtpu_worker.contract.queues import HELD_KEY, LEASES_KEY
from sdtpu_worker.errors import ConfigurationError

if TYPE_CHECKING:
    from redis import Redis

OLDEST_REDIS = (5, 0)
"""Older servers refuse a script that writes after it has asked for the time."""
_TRACKING_SINCE, _OLDEST_TESTED = (6, 0), (6, 2)
_LITTLE_ROOM = 0.1  # as a share of maxmemory


def redis_warnings(client: Redis, *, images_in_redis: bool = True, prefix: str = "") -> list[str]:
    """Return a warning for each thing that is wrong: the consequence, and the remedy with the name of the directive.

    Asks INFO, and CONFIG GET where that is permitted, and tries a script on two keys. A fact that a managed service or
    an ACL keeps secret gives no warning.

    Args:
        client: a client of the broker or of the result backend.
        images_in_redis: whether this server stores the images.
        prefix: kombu's `global_keyprefix`.

    Raises:
        ConfigurationError: the server is too old for this worker, or belongs to a Redis Cluster.
        redis.exceptions.ConnectionError: the server cannot be reached.
    """
    try:
        info: Mapping[str, Any] = client.info()
    except ResponseError:
        info = {}
    kept = ["jobs", "leases", "results", *(["images"] if images_in_redis else [])]
    if info.get("cluster_enabled") or _spreads_keys(client, prefix):
        raise ConfigurationError(
            "the Redis server belongs to a Redis Cluster (cluster-enabled yes), which spreads over several servers the"
            " keys that Celery and this worker change in one step; let broker_url name a server that is no cluster"
            " (managed services: cluster mode disabled), for failover one with Sentinel"
        )
    return [
        *_version(info),
        *_role(info),
        *_eviction(info, kept),
        *_room(info, kept),
        *_persistence(client, info),
    ]


def _version(info: Mapping[str, Any]) -> Iterator[str]:
    text = str(info.get("redis_version", ""))
    match = re.match(r"(\d+)\.(\d+)", text)
    if not match:
        return
    version = (int(match[1]), int(match[2]))
    if version < OLDEST_REDIS:
        raise ConfigurationError(
            f"the Redis server is {text}, but the worker's scripts need {_dotted(OLDEST_REDIS)} or newer, better"
            f" {_dotted(_OLDEST_TESTED)}; upgrade the server"
        )
    if version < _TRACKING_SINCE:
        yield (
            f"the Redis server is {text}, which has no CLIENT TRACKING: an idle worker polls for new jobs and finds"
            f" them a little later. Upgrade the server to {_dotted(_OLDEST_TESTED)} or newer."
        )
    elif version < _OLDEST_TESTED:
        yield (
            f"the Redis server is {text}; this worker is tested with {_dotted(_OLDEST_TESTED)} and newer."
            " Upgrade the server."
        )


def _spreads_keys(client: Redis, prefix: str) -> bool:
    """Return whether a script may not use two of the worker's keys at once, whatever INFO says of a cluster."""
    try:
        client.eval("return 0", 2, prefix + HELD_KEY, prefix + LEASES_KEY)
    except (ClusterCrossSlotError, ClusterDownError, AskError):  # the last one is also what MOVED means
        return True
    except ResponseError:  # the user may not: what that leads to, others say
        return False
    return False


def _role(info: Mapping[str, Any]) -> Iterator[str]:
    if info.get("role") == "slave":
        master = f"{info.get('master_host', '?')}:{info.get('master_port', '?')}"
        yield (
            "connected to a Redis replica: every write fails (replica-read-only), or is lost when the replica next"
            f" synchronises, so this worker takes no job. Connect to its master {master}, or through Sentinel"
            " (broker_url = 'sentinel://…'), or end the replication (replicaof no one)."
        )


def _eviction(info: Mapping[str, Any], kept: list[str]) -> Iterator[str]:
    policy = info.get("maxmemory_policy", "noeviction")
    if info.get("maxmemory") == 0:  # no limit, so nothing is evicted
        return
    if policy.startswith("allkeys-"):
        yield (
            f"Redis' maxmemory-policy is {policy}: when its memory is full, it removes any key, so {_all_of(kept)} may"
            " vanish without an error. Set maxmemory-policy noeviction."
        )
    elif policy.startswith("volatile-"):
        expiring = [name for name in kept if name in ("results", "images")]
        yield (
            f"Redis' maxmemory-policy is {policy}: when its memory is full, it removes keys that expire, so"
            f" {_all_of(expiring)} may vanish before result_expires. Set maxmemory-policy noeviction."
        )


def _room(info: Mapping[str, Any], kept: list[str]) -> Iterator[str]:
    limit, used = info.get("maxmemory", 0), info.get("used_memory", 0)
    if limit and used > (1 - _LITTLE_ROOM) * limit:
        elsewhere = ", or store images elsewhere (sdtpu_image_store)" if "images" in kept else ""
        yield (
            f"Redis uses {used / 2**20:,.0f} of {limit / 2**20:,.0f} MiB (maxmemory): once its memory is full, it"
            f" refuses new {_all_of(kept)}, or removes old ones. Raise maxmemory, or let results expire sooner"
            f" (result_expires){elsewhere}."
        )


def _persistence(client: Redis, info: Mapping[str, Any]) -> Iterator[str]:
    if info.get("aof_enabled", 1):
        return
    try:
        snapshots = client.config_get("save")
    except ResponseError:
        return
    if snapshots.get("save") == "":
        yield (
            "Redis writes nothing to its disk (appendonly no, save ''): a restart of Redis loses every job that waits"
            " or runs, and every result. Set appendonly yes."
        )


def _all_of(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
