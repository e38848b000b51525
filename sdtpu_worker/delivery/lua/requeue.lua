-- Requeue: the holder puts its message back at the front of its queue. Needs return_to_queue.lua.
--
-- KEYS:   the hash of held messages, the sorted set of leases, and, unless the job is a suspect, the list of its starts
-- ARGV:   the message's tag; the name of this worker process in the list of starts, which is removed there
-- Result: none
if return_to_queue(ARGV[1], 'alive') and KEYS[3] then redis.call('LREM', KEYS[3], 0, ARGV[2]) end
