from flow_kit import NAMESPACE

from sglang_kvcodec.flow import stored_pages
from sglang_kvcodec.flow.stored_pages import StoredPages
from sglang_kvcodec.testing.pages import hash_of

OTHER = bytes(32)


def test_what_is_stored_and_what_is_not():
    stored = StoredPages()
    hashes = [hash_of(i) for i in range(4)]
    assert stored.missing(NAMESPACE, hashes) == [0, 1, 2, 3]
    stored.update(NAMESPACE, hashes, [True, False, True, False])
    assert stored.missing(NAMESPACE, hashes) == [1, 3]
    assert stored.missing(OTHER, hashes) == [0, 1, 2, 3]
    stored.update(NAMESPACE, hashes[:2], [False, True])
    assert stored.missing(NAMESPACE, hashes) == [0, 3]
    assert stored.missing(NAMESPACE, []) == []


def test_the_oldest_knowledge_is_forgotten_first(monkeypatch):
    monkeypatch.setattr(stored_pages, "MAX_PAGES", 3)
    stored = StoredPages()
    hashes = [hash_of(i) for i in range(4)]
    stored.update(NAMESPACE, hashes[:3], [True] * 3)
    stored.update(NAMESPACE, hashes[:1], [True])
    stored.update(NAMESPACE, hashes[3:], [True])
    assert stored.missing(NAMESPACE, hashes) == [1]
