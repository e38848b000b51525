-- Dead-letter: forget a message that cannot be run, count it, and keep a description of it among the last ones.
--
-- KEYS:   the hash of held messages, the sorted set of leases, the list of dead letters, the hash of their counts
-- ARGV:   the message's tag; the name to count it by; the description in JSON; the index of the last description to
--         keep, from 0
-- Result: none
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HINCRBY', KEYS[4], ARGV[2], 1)
redis.call('LPUSH', KEYS[3], ARGV[3])
redis.call('LTRIM', KEYS[3], 0, ARGV[4])
