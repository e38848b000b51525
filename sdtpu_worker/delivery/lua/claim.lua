-- Claim: take the first message of the first list that has one. A message of a task queue is recorded as held, with a
-- lease; one of any other queue is only taken, as kombu's own BRPOP takes it.
--
-- KEYS:   the hash of held messages, the sorted set of leases, then the lists in the order in which to look at them
-- ARGV:   the message's new tag; the lease in seconds; the size in bytes up to which a message is returned whole; the
--         number of bytes to return of each end of a larger one; for each list, in the same order, a letter: 't' where
--         it belongs to a task queue
-- Result: {the list's number from 0, the message}; of a larger message of a task queue {the number, its size, its first
--         bytes, its last bytes}; false when every list is empty
--
-- The last call only reads: Redis then remembers the lists, so that CLIENT TRACKING reports a write to one of them.
for i = 3, #KEYS do
    local message = redis.call('RPOP', KEYS[i])
    if message then
        if string.sub(ARGV[5], i - 2, i - 2) ~= 't' then return {i - 3, message} end
        local now = redis.call('TIME')
        redis.call('HSET', KEYS[1], ARGV[1], KEYS[i] .. '\n' .. message)
        redis.call('ZADD', KEYS[2], now[1] + now[2] / 1e6 + ARGV[2], ARGV[1])
        if #message <= tonumber(ARGV[3]) then return {i - 3, message} end
        return {i - 3, #message, string.sub(message, 1, ARGV[4]), string.sub(message, -ARGV[4])}
    end
end
redis.call('EXISTS', unpack(KEYS, 3))
return false
