-- Enter: find the image of an equal job, or another job that draws it; else take the lead.
--
-- KEYS:   the pointer, the lead
-- ARGV:   the job's token; its lead; the lead's time to live in milliseconds; '1' to take the lead from another job; the
--         most bytes of a pointer to return; of a lead; the longest time to live that a worker gives to a lead
-- Result: {the pointer, ''} where there is one; {'', another job's lead}; {'', ''} where this job has the lead now
--
-- A lead that does not expire in time is not one that a worker wrote: it is replaced.
local pointer = redis.call('GETRANGE', KEYS[1], 0, ARGV[5] - 1)
if pointer ~= '' then return {pointer, ''} end
local lead = redis.call('GETRANGE', KEYS[2], 0, ARGV[6] - 1)
local left = redis.call('PTTL', KEYS[2])
local is_own = string.sub(lead, 1, #ARGV[1] + 1) == ARGV[1] .. ' '
if lead ~= '' and not is_own and ARGV[4] ~= '1' and left > 0 and left <= tonumber(ARGV[7]) then return {'', lead} end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
return {'', ''}
