"""The index of a shared store as Lua: each script is one atomic step, and all of them work on the keys of one slot.

``KEYS``: ``entries`` (hash: key -> ``size:token:time of the put in ms``), ``order`` (sorted set: key -> sequence number
of the last use), ``leases`` (hash: token -> ``expiry in ms:size:key``, of puts under way), ``doomed`` (hash: name of an
object that is to be deleted -> size) and ``counts`` (hash: ``held`` bytes of all three, ``stored`` bytes of the
entries, ``evicted``, ``sequence``; where objects outlive the index ``life``, a token that is there until the index is
lost, and ``complete``, 1 once all objects that were there have been counted).

Bytes count as held from before an object is written until after it is deleted, so that what lies in the servers is
never more than what is counted. Objects lie elsewhere, under names that are used once: ``NAME`` + key + token.
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
local function parts_of(name) return string.sub(name, #ARGV[1] + 1, -17), string.sub(name, -16) end
local function is_stray(name)
  local key, token = parts_of(name)
  local _, known = entry_of(key)
  return known ~= token and redis.call('HEXISTS', leases, token) == 0 and redis.call('HEXISTS', doomed, name) == 0
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
-- ARGV: NAME, key, size, token, capacity, most names, lease in ms, 1 if the index has to be complete.
-- 'there'; or 'go', the bytes are held; or 'room' and what to delete first, nothing while others hold everything; or
-- 'incomplete': there may be more than what is counted.
local key, size, token = ARGV[2], tonumber(ARGV[3]), ARGV[4]
if redis.call('HEXISTS', entries, key) == 1 then
  use(key)
  return {'there'}
end
if redis.call('HEXISTS', leases, token) == 1 then return {'go'} end
if ARGV[8] == '1' and counted('complete') ~= 1 then return {'incomplete'} end
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
-- ARGV: NAME, key, token or nothing for any, 1 if the index has to be complete to say that something is not there.
-- The name of what is to be deleted, '' if it is not there, 0 if nobody knows.
local size, token = entry_of(ARGV[2])
if not size and ARGV[4] == '1' and counted('complete') ~= 1 then return 0 end
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
  if is_stray(ARGV[i]) then strays[#strays + 1] = ARGV[i] end
end
return strays
"""
)

REBUILD = (
    _PRELUDE
    + """
-- ARGV: NAME, a new token. The token that the index has had since it is there.
redis.call('HSETNX', counts, 'life', ARGV[2])
return redis.call('HGET', counts, 'life')
"""
)

ADOPT = (
    _PRELUDE
    + """
-- ARGV: NAME, then name, size and time in ms of each object that is there. Strays become entries, to be evicted before
-- all that has been used, the oldest first. The names of those whose key has an entry, which are to be deleted.
local names = {}
for i = 2, #ARGV, 3 do
  local name, size = ARGV[i], tonumber(ARGV[i + 1])
  if is_stray(name) then
    local key, token = parts_of(name)
    count('held', size)
    if entry_of(key) then
      doom(name, size)
      names[#names + 1] = name
    else
      redis.call('HSET', entries, key, string.format('%.0f:%s:', size, token) .. ARGV[i + 2])
      redis.call('ZADD', order, tonumber(ARGV[i + 2]) - 1e13, key)
      count('stored', size)
    end
  end
end
return names
"""
)

COMPLETE = (
    _PRELUDE
    + """
-- ARGV: NAME, the token of before all objects were counted. 0 if the index has been lost since.
if redis.call('HGET', counts, 'life') ~= ARGV[2] then return 0 end
redis.call('HSET', counts, 'complete', 1)
return 1
"""
)

IS_COMPLETE = (
    _PRELUDE
    + """
return counted('complete')
"""
)

STAT = (
    _PRELUDE
    + """
return {redis.call('HLEN', entries), counted('stored'), counted('evicted')}
"""
)
