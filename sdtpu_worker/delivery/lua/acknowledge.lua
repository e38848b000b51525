-- Acknowledge: forget a message for good, with all that is kept of its job.
--
-- KEYS:   the hash of held messages, the sorted set of leases, then the keys of the job
-- ARGV:   the message's tag
-- Result: none
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
for i = 3, #KEYS do redis.call('DEL', KEYS[i]) end
