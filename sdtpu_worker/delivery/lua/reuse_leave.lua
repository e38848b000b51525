-- Leave: give up the lead, if the job has it, after writing a pointer, if there is one.
--
-- KEYS:   the pointer, the lead
-- ARGV:   the job's token; the pointer or ''; the pointer's time to live in milliseconds
-- Result: 1 where the job had the lead
local lead = redis.call('GETRANGE', KEYS[2], 0, #ARGV[1])
local had_it = lead == ARGV[1] .. ' '
if had_it then redis.call('DEL', KEYS[2]) end
if ARGV[2] ~= '' then redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
return had_it and 1 or 0
