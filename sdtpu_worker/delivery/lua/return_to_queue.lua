-- Shared by requeue.lua, sweep.lua and requeue_due.lua, which stand below it.
--
-- Move a message from the hash of held messages to the front of the list it came from, and remove its score.
-- KEYS[1]: the hash of held messages. KEYS[2]: the sorted set that has the message's tag (leases, or deferred ones).
-- holder:  'died'  adds a mark (a space, which JSON ignores) before the message: one more holder has died
--          'alive' adds a mark only where the message has none: Celery sees that it is redelivered
--          'none'  adds no mark: nobody held the message
-- Result:  the record in the hash, or false where the message is not held any more.
local function return_to_queue(tag, holder)
    local record = redis.call('HGET', KEYS[1], tag)
    if record then
        local list, message = string.match(record, '^([^\n]*)\n(.*)$')
        local is_marked = string.sub(message, 1, 1) == ' '
        if holder == 'died' or holder == 'alive' and not is_marked then message = ' ' .. message end
        redis.call('HDEL', KEYS[1], tag)
        redis.call('RPUSH', list, message)
    end
    redis.call('ZREM', KEYS[2], tag)
    return record
end
