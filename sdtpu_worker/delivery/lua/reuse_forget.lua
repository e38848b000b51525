-- Forget: remove a pointer to an image that is gone, unless another job has replaced it meanwhile.
--
-- KEYS:   the pointer
-- ARGV:   what it was
-- Result: 1; 0 where it is another one
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
