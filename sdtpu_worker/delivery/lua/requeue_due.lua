-- Put deferred messages that are due at the front of their queues, the earliest one foremost. Needs
-- return_to_queue.lua.
--
-- KEYS:   the hash of held messages, the sorted set of deferred messages
-- ARGV:   the largest number of messages to move
-- Result: the seconds until the next deferred message is due, as text; false when there is none
local now = redis.call('TIME')
now = now[1] + now[2] / 1e6
local tags = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, ARGV[1])
for i = #tags, 1, -1 do return_to_queue(tags[i], 'none') end
local next = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
return next[2] and tostring(math.max(0, next[2] - now)) or false
