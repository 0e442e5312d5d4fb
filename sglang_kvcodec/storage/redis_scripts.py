"""The index of a Redis store as Lua: each script is one atomic step, and all of them work on the keys of one slot.

``KEYS``: ``entries`` (hash: key -> ``size:token:time of the put in ms``), ``order`` (sorted set: key -> sequence number
of the last use), ``leases`` (hash: token -> ``expiry in ms:size:key``, of puts under way), ``doomed`` (hash: name of an
object that is to be deleted -> size) and ``counts`` (hash: ``held`` bytes of all three, ``stored`` bytes of the
entries, ``evicted``, ``sequence``).

Bytes count as held from before an object is written until after it is deleted, so that what lies in the servers is
never more than what is counted. Objects lie in other slots, under names that are used once: ``NAME`` + key + token.
"""

from __future__ import annotations

_PRELUDE = """
local entries, order, leases, doomed, counts = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local function count(field, by) return redis.call('HINCRBY', counts, field, by) end
local function counted(field) return tonumber(redis.call('HGET', counts, field) or '0') end
local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end
local function entry_of(key)
  local entry = redis.call('HGET', entries, key)
  if not entry then return nil end
  local size, token = string.match(entry, '^(%d+):(%x+):')
  return tonumber(size), token
end
local function use(key) redis.call('ZADD', order, count('sequence', 1), key) end
local function doom(name, size) redis.call('HSET', doomed, name, size) end
local function drop(key, size, token)
  redis.call('HDEL', entries, key)
  redis.call('ZREM', order, key)
  count('stored', -size)
  doom(ARGV[1] .. key .. token, size)
end
-- Names to delete so that `size` bytes fit: what others left behind first, then the least recently used.
local function room_for(size, capacity, most)
  local names, missing = {}, counted('held') + size - capacity
  if missing <= 0 then return names end
  local now = now_ms()
  local under_way = redis.call('HGETALL', leases)
  for i = 1, #under_way, 2 do
    local expiry, lease_size, key = string.match(under_way[i + 1], '^(%d+):(%d+):(.*)$')
    if tonumber(expiry) < now then
      redis.call('HDEL', leases, under_way[i])
      doom(ARGV[1] .. key .. under_way[i], lease_size)
    end
  end
  local left = redis.call('HGETALL', doomed)
  for i = 1, #left, 2 do
    if #names < most then
      names[#names + 1] = left[i]
      missing = missing - tonumber(left[i + 1])
    end
  end
  while missing > 0 and #names < most do
    local oldest = redis.call('ZRANGE', order, 0, 0)[1]
    if not oldest then break end
    local old_size, token = entry_of(oldest)
    drop(oldest, old_size, token)
    count('evicted', 1)
    names[#names + 1] = ARGV[1] .. oldest .. token
    missing = missing - old_size
  end
  return names
end
"""

FIND = (
    _PRELUDE
    + """
-- ARGV: NAME, keys. Their entries; marks them as used, the first one last.
local found = {}
for first = 2, #ARGV, 1000 do
  local part = redis.call('HMGET', entries, unpack(ARGV, first, math.min(first + 999, #ARGV)))
  for i = 1, #part do found[#found + 1] = part[i] end
end
local uses, sequence = {}, counted('sequence')
for i = #found, 1, -1 do
  if found[i] then
    sequence = sequence + 1
    uses[#uses + 1] = sequence
    uses[#uses + 1] = ARGV[i + 1]
  end
  if #uses >= 1000 or (i == 1 and #uses > 0) then
    redis.call('ZADD', order, unpack(uses))
    uses = {}
  end
end
redis.call('HSET', counts, 'sequence', sequence)
return found
"""
)

BEGIN = (
    _PRELUDE
    + """
-- ARGV: NAME, key, size, token, capacity, most names, lease in ms.
-- 'there'; or 'go', the bytes are held; or 'room' and what to delete first, nothing while others hold everything.
local key, size, token = ARGV[2], tonumber(ARGV[3]), ARGV[4]
if redis.call('HEXISTS', entries, key) == 1 then
  use(key)
  return {'there'}
end
if redis.call('HEXISTS', leases, token) == 1 then return {'go'} end
if counted('held') + size > tonumber(ARGV[5]) then
  return {'room', unpack(room_for(size, tonumber(ARGV[5]), tonumber(ARGV[6])))}
end
count('held', size)
redis.call('HSET', leases, token, string.format('%.0f:%d:', now_ms() + tonumber(ARGV[7]), size) .. key)
return {'go'}
"""
)

COMMIT = (
    _PRELUDE
    + """
-- ARGV: NAME, key, token. 'stored'; 'there', another put was faster; or 'lost', the lease ran out.
local key, token = ARGV[2], ARGV[3]
local old_size, old_token = entry_of(key)
local lease = redis.call('HGET', leases, token)
if not lease then
  if old_token == token then return 'stored' end
  return 'lost'
end
local size = tonumber(string.match(lease, '^%d+:(%d+):'))
redis.call('HDEL', leases, token)
if old_size then
  doom(ARGV[1] .. key .. token, size)
  use(key)
  return 'there'
end
redis.call('HSET', entries, key, string.format('%.0f:%s:%.0f', size, token, now_ms()))
count('stored', size)
use(key)
return 'stored'
"""
)

ABANDON = (
    _PRELUDE
    + """
-- ARGV: NAME, key, token. Gives up a put; its object, if it got there, is to be deleted.
local lease = redis.call('HGET', leases, ARGV[3])
if lease then
  redis.call('HDEL', leases, ARGV[3])
  doom(ARGV[1] .. ARGV[2] .. ARGV[3], tonumber(string.match(lease, '^%d+:(%d+):')))
end
return 1
"""
)

REMOVE = (
    _PRELUDE
    + """
-- ARGV: NAME, key, token or nothing for any. The name of what is to be deleted, '' if it is not there.
local size, token = entry_of(ARGV[2])
if not size or (ARGV[3] ~= '' and ARGV[3] ~= token) then return '' end
drop(ARGV[2], size, token)
return ARGV[1] .. ARGV[2] .. token
"""
)

BURY = (
    _PRELUDE
    + """
-- ARGV: NAME, names that have been deleted: their bytes are free.
for i = 2, #ARGV do
  local size = redis.call('HGET', doomed, ARGV[i])
  if size and redis.call('HDEL', doomed, ARGV[i]) == 1 then count('held', -tonumber(size)) end
end
return 1
"""
)

TRIM = (
    _PRELUDE
    + """
-- ARGV: NAME, capacity, most names. What to delete so that the capacity holds.
return room_for(0, tonumber(ARGV[2]), tonumber(ARGV[3]))
"""
)

STRAYS = (
    _PRELUDE
    + """
-- ARGV: NAME, names of objects that were found. Those that the index knows nothing of.
local strays = {}
for i = 2, #ARGV do
  local key, token = string.sub(ARGV[i], #ARGV[1] + 1, -17), string.sub(ARGV[i], -16)
  local size, known = entry_of(key)
  if known ~= token and redis.call('HEXISTS', leases, token) == 0 and redis.call('HEXISTS', doomed, ARGV[i]) == 0 then
    strays[#strays + 1] = ARGV[i]
  end
end
return strays
"""
)

STAT = (
    _PRELUDE
    + """
return {redis.call('HLEN', entries), counted('stored'), counted('evicted')}
"""
)
