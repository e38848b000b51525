-- Sweep: redeliver the messages whose lease has expired. Needs return_to_queue.lua.
--
-- KEYS:   the hash of held messages, the sorted set of leases
-- ARGV:   the largest number of messages to redeliver
-- Result: the number of messages redelivered
local now = redis.call('TIME')
local tags = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now[1] + now[2] / 1e6, 'LIMIT', 0, ARGV[1])
for _, tag in ipairs(tags) do return_to_queue(tag, 'died') end
return #tags
