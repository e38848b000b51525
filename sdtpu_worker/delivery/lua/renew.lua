-- Renew the leases of the messages that this worker still holds.
--
-- KEYS:   the sorted set of leases
-- ARGV:   the lease in seconds, then the messages' tags
-- Result: the tags that have no lease any more: these messages were redelivered
--
-- The first write removes nothing: a Redis without free memory refuses a script whose first write may need some.
local now, gone = redis.call('TIME'), {}
redis.call('ZREM', KEYS[1], '')
local expires_at = now[1] + now[2] / 1e6 + ARGV[1]
for i = 2, #ARGV do
    if redis.call('ZSCORE', KEYS[1], ARGV[i]) then redis.call('ZADD', KEYS[1], expires_at, ARGV[i])
    else gone[#gone + 1] = ARGV[i] end
end
return gone
