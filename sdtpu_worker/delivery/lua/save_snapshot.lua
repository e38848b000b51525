-- Keep a job's snapshot, if this worker still holds its message: else another worker has the job, and may be done with
-- it, and nobody would remove the snapshot.
--
-- KEYS:   the hash of held messages, the job's snapshot
-- ARGV:   the message's tag; the snapshot; its time to live in seconds
-- Result: 1; 0 where the message is not held any more
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[3])
return 1
