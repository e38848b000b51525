"""The Lua scripts by which messages move in Redis, read from `lua/` when this module is imported.

A message is in exactly one place: in its queue's list; or in the hash of held messages, with its lease in a sorted set;
or deferred, in the same hash with the time at which it is due in another sorted set; or, once acknowledged, nowhere.
One script makes each move, so a worker that dies at any moment takes no message with it. A lease is a time on Redis'
own clock: a message whose lease has expired is redelivered, unless its holder has renewed the lease before.

Each file in `lua/` opens with a comment that says what the script does, its KEYS and ARGV, and its result. A Redis that
has reached `maxmemory` refuses a script whose first write may need memory, so the scripts free memory first.

The scripts `reuse_*` move no message; see `sdtpu_worker.reuse.ledger`.
"""

from __future__ import annotations

from importlib import resources

from redis.exceptions import ResponseError

REDELIVERED = b" "
"""The mark before a message that was held before: one for each holder that died. JSON ignores spaces."""


def is_read_only(error: ResponseError) -> bool:
    """Return whether a Redis refused a write because it is a replica, perhaps since a moment ago.

    Servers before Redis 7 wrap an error within a script into one of another class.
    """
    return "READONLY" in str(error)


def _read(*names: str) -> str:
    """Return the text of the named scripts, one after the other, without the lines that are only a comment."""
    folder = resources.files(__package__) / "lua"
    lines = [line for name in names for line in (folder / f"{name}.lua").read_text("utf-8").splitlines(keepends=True)]
    return "".join(line for line in lines if not line.startswith("--"))


CLAIM = _read("claim")
ACKNOWLEDGE = _read("acknowledge")
REQUEUE = _read("return_to_queue", "requeue")
RECORD_STARTS = _read("record_starts")
SAVE_SNAPSHOT = _read("save_snapshot")
RENEW = _read("renew")
SWEEP = _read("return_to_queue", "sweep")
DEFER = _read("defer")
REQUEUE_DUE = _read("return_to_queue", "requeue_due")
DEAD_LETTER = _read("dead_letter")
REUSE_ENTER = _read("reuse_enter")
REUSE_LEAVE = _read("reuse_leave")
REUSE_RENEW = _read("reuse_renew")
REUSE_FORGET = _read("reuse_forget")
