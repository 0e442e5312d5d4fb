"""Objects of tests, named by a letter each: put into a store, and what is left of them there."""

from sglang_kvcodec.testing.storage import make_key, make_value


def fill(store, names, size_bytes=30):
    for name in names:
        store.put(make_key(name), make_value(name, size_bytes))


def contents(store, names):
    return {name: value for name in names if (value := store.get(make_key(name))) is not None}
