-- Sweep: redeliver the messages whose lease has expired. Needs return_to_queue.lua.
--
-- KEYS:   the hash of held messages, the sorted set of leases
-- ARGV:   the largest number of messages to redeliver; the time, in seconds since 1970, after which nothing is
--         redelivered: then the worker that sweeps, or Redis, stood still since the worker looked, and so perhaps did
--         the other workers
-- Result: the number of messages redelivered
local now = redis.call('TIME')
now = now[1] + now[2] / 1e6
if now > tonumber(ARGV[2]) then return 0 end
local tags = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, ARGV[1])
for _, tag in ipairs(tags) do return_to_queue(tag, 'died') end
return #tags
