"""Stand-ins for SGLang's pool and tree and for a restorer, as far as those ask that set slots aside."""

import types

import torch

from sglang_kvcodec.plugin.set_aside import SetAside


class Allocator:
    def __init__(self, size):
        self.size = size
        self.free_slots = list(range(size))

    def available_size(self):
        return len(self.free_slots)

    def alloc(self, tokens):
        if tokens > len(self.free_slots):
            return None
        taken, self.free_slots = self.free_slots[:tokens], self.free_slots[tokens:]
        return torch.tensor(taken)

    def free(self, slots):
        self.free_slots += slots.tolist()


class Cache:
    """SGLang's tree, as far as the book asks it."""

    def __init__(self, size=1000):
        self.token_to_kv_pool_allocator = Allocator(size)
        self.evictable = 0
        self.written = {}
        self.req_to_token_pool = types.SimpleNamespace(write=self._write)

    def _write(self, place, slots):
        self.written[place[1].start, place[1].stop] = slots.tolist()

    def evictable_size(self):
        return self.evictable

    def evict(self, params):
        self.evictable -= params.num_tokens
        self.token_to_kv_pool_allocator.free_slots += range(5000, 5000 + params.num_tokens)


class Restorer:
    """Keeps what it was asked for."""

    def __init__(self):
        self.restores = []

    def start(self, jobs, on_layers, on_failure, after, is_awaited):
        assert after == ["event"]
        assert not is_awaited
        restore = types.SimpleNamespace(jobs=jobs, on_layers=on_layers, on_failure=on_failure, bad_pages=[])
        self.restores.append(restore)
        return restore


def set_aside(cache, restorer, smallest_of_ranks=list, on_bad_pages=lambda pages: None):
    return SetAside(cache, restorer, lambda: ["event"], smallest_of_ranks, on_bad_pages)
