-- Record which jobs are on this worker's devices, as far as it still holds their messages, and which have left them.
--
-- KEYS:   the hash of held messages, the lists of starts of the jobs that start, then those of the jobs that have left
-- ARGV:   the name of this worker process in these lists; the lists' time to live in seconds; the tags of the messages
--         of the jobs that start, in the order of KEYS
-- Result: none
for i = 2, #KEYS do
    local tag = ARGV[i + 1]
    if not tag then
        redis.call('LREM', KEYS[i], 0, ARGV[1])
    elseif redis.call('HEXISTS', KEYS[1], tag) == 1 then
        redis.call('RPUSH', KEYS[i], ARGV[1])
        redis.call('EXPIRE', KEYS[i], ARGV[2])
    end
end
