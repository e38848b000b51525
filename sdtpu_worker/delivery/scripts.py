"""The scripts by which messages move in Redis, and the keys that they touch.

A message lies in exactly one place: in its queue's list, or in the hash of held messages with its lease in a sorted
set, or nowhere, when it was acknowledged. Every move between them is one Lua script, so that no moment exists in which
a dying worker takes a message with it. A lease is the time, on Redis' own clock, at which the message goes back to its
queue unless its holder has renewed it. A message that is not due yet has its time in another sorted set instead.

Each script's KEYS begin with the hash of held messages and the sorted set that has the message's time, unless it says
otherwise. A full Redis (`maxmemory`) refuses a script whose first write may need memory; so what frees some comes
first.
"""

from __future__ import annotations

from dataclasses import dataclass

REDELIVERED = b" "
"""Stands before a message that was held before, once for every holder that died: JSON ignores spaces."""


@dataclass(frozen=True)
class Keys:
    """Where everything is; `prefix` is kombu's `global_keyprefix`."""

    prefix: str = ""

    @property
    def held(self) -> str:
        """A hash: by tag, the list that a message came from, a line feed, the message."""
        return f"{self.prefix}sdtpu:unacked"

    @property
    def leases(self) -> str:
        """A sorted set: tags by the time, in seconds, at which their lease ends."""
        return f"{self.prefix}sdtpu:unacked_index"

    @property
    def delayed(self) -> str:
        """A sorted set: tags of messages that nobody holds by the time, in seconds, at which they are due."""
        return f"{self.prefix}sdtpu:delayed"

    @property
    def dead(self) -> str:
        """A list of JSON: the last messages that were put aside, and why."""
        return f"{self.prefix}sdtpu:dead"

    @property
    def dead_counts(self) -> str:
        """A hash: how many messages were put aside, by kind of reason."""
        return f"{self.prefix}sdtpu:dead:counts"

    def starts(self, task_id: str) -> str:
        """A list: the processes on whose devices a job was, by host, a line feed and an id."""
        return f"{self.prefix}sdtpu:starts:{task_id}"

    def snapshot(self, task_id: str) -> str:
        """A string: the state of a job that was handed over."""
        return f"{self.prefix}sdtpu:snap:{task_id}"


CLAIM = """
for i = 3, #KEYS do
    local message = redis.call('RPOP', KEYS[i])
    if message then
        local now = redis.call('TIME')
        redis.call('HSET', KEYS[1], ARGV[1], KEYS[i] .. '\\n' .. message)
        redis.call('ZADD', KEYS[2], now[1] + now[2] / 1e6 + ARGV[2], ARGV[1])
        if #message <= tonumber(ARGV[3]) then return {i - 3, message} end
        return {i - 3, #message, string.sub(message, 1, ARGV[4]), string.sub(message, -ARGV[4])}
    end
end
redis.call('EXISTS', unpack(KEYS, 3))
return false
"""
"""Take the first message that there is and record it as held.

KEYS: held, leases, then the lists to look at in this order. ARGV: a tag, the lease in seconds, the size up to which a
message is read whole, the bytes to read of both ends of a larger one. Returns the list's number and the message, or
the number, the size and both ends, or nothing. (The last call only reads: it makes Redis remember the lists, so that
`CLIENT TRACKING` tells when one of them is written to.)"""

ACK = """
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
for i = 3, #KEYS do redis.call('DEL', KEYS[i]) end
"""
"""Forget a message, with all that is kept of its job. KEYS: held, leases, those of the job. ARGV: the tag."""

_GIVE_BACK = """
local function give_back(tag, was_held)
    local record = redis.call('HGET', KEYS[1], tag)
    if record then
        local list, message = string.match(record, '^([^\\n]*)\\n(.*)$')
        local is_marked = string.sub(message, 1, 1) == ' '
        if was_held == 'died' or was_held == 'alive' and not is_marked then message = ' ' .. message end
        redis.call('HDEL', KEYS[1], tag)
        redis.call('RPUSH', list, message)
    end
    redis.call('ZREM', KEYS[2], tag)
    return record
end
"""
"""Put a message at the front of its queue. `was_held` says what became of its holder, if it had one."""

RELEASE = f"""{_GIVE_BACK}
if give_back(ARGV[1], 'alive') and KEYS[3] then redis.call('LREM', KEYS[3], 0, ARGV[2]) end
"""
"""Give a message back. KEYS: held, leases, the job's starts if ours does not count. ARGV: the tag, our name there."""

RECORD = """
for i = 2, #KEYS do
    local tag = ARGV[i + 1]
    if not tag then
        redis.call('LREM', KEYS[i], 0, ARGV[1])
    elseif redis.call('HEXISTS', KEYS[1], tag) == 1 then
        redis.call('RPUSH', KEYS[i], ARGV[1])
        redis.call('EXPIRE', KEYS[i], ARGV[2])
    end
end
"""
"""Write down which jobs are on our devices, as far as their messages are still ours, and which are not any more.

KEYS: held, the starts of the first, those of the others. ARGV: our name there, its expiry in s, tags of the first."""

RENEW = """
local now, gone = redis.call('TIME'), {}
redis.call('ZREM', KEYS[1], '')
local ends = now[1] + now[2] / 1e6 + ARGV[1]
for i = 2, #ARGV do
    if redis.call('ZSCORE', KEYS[1], ARGV[i]) then redis.call('ZADD', KEYS[1], ends, ARGV[i])
    else gone[#gone + 1] = ARGV[i] end
end
return gone
"""
"""Renew leases. KEYS: leases. ARGV: the lease in seconds, the tags. Returns the tags that have none any more."""

SWEEP = f"""{_GIVE_BACK}
local now = redis.call('TIME')
local tags = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now[1] + now[2] / 1e6, 'LIMIT', 0, ARGV[1])
for _, tag in ipairs(tags) do give_back(tag, 'died') end
return #tags
"""
"""Give back those whose lease has ended. KEYS: held, leases. ARGV: how many at most. Returns how many."""

DELAY = """
local now = redis.call('TIME')
if tonumber(ARGV[2]) <= now[1] + now[2] / 1e6 or redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZADD', KEYS[3], ARGV[2], ARGV[1])
return 1
"""
"""Put a message aside until it is due. KEYS: held, leases, delayed. ARGV: the tag, the time. Returns 0 if it is due."""

BRING_DUE = f"""{_GIVE_BACK}
local now = redis.call('TIME')
now = now[1] + now[2] / 1e6
local tags = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, ARGV[1])
for i = #tags, 1, -1 do give_back(tags[i], 'never') end
local next = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
return next[2] and tostring(math.max(0, next[2] - now)) or false
"""
"""Put those that are due at the front of their queues, the earliest first.

KEYS: held, delayed. ARGV: how many at most. Returns the seconds until the next one, or nothing."""

BURY = """
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HINCRBY', KEYS[4], ARGV[2], 1)
redis.call('LPUSH', KEYS[3], ARGV[3])
redis.call('LTRIM', KEYS[3], 0, ARGV[4])
"""
"""Put a message aside for good. KEYS: held, leases, dead, counts. ARGV: the tag, its kind, a letter, the last index
of the letters that are kept."""
