-- Defer: keep a message, held by nobody, until it is due.
--
-- KEYS:   the hash of held messages, the sorted set of leases, the sorted set of deferred messages
-- ARGV:   the message's tag; the time at which it is due, in seconds since 1970
-- Result: 1; 0 where the message is due already, or is not held any more
local now = redis.call('TIME')
if tonumber(ARGV[2]) <= now[1] + now[2] / 1e6 or redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZADD', KEYS[3], ARGV[2], ARGV[1])
return 1
