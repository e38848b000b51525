-- Renew: keep the leads that this worker's jobs have, with how far the jobs are.
--
-- KEYS:   the leads
-- ARGV:   a lead's time to live in milliseconds; then the leads in the order of KEYS, the token first in each
-- Result: how many are still theirs
local count = 0
for i, key in ipairs(KEYS) do
    local token = string.match(ARGV[i + 1], '^%S+ ')
    if redis.call('GETRANGE', key, 0, #token - 1) == token then
        redis.call('SET', key, ARGV[i + 1], 'PX', ARGV[1])
        count = count + 1
    end
end
return count
