"""What the sending thread does with what nobody expected: it loses only what it was about."""

import threading
import types

from flow_kit import LIMIT_S, NAMESPACE, counted

from sglang_kvcodec.flow.publish_peer import PutFailure
from sglang_kvcodec.flow.publish_queue import CodedPage
from sglang_kvcodec.flow.publish_sending import SendLoop
from sglang_kvcodec.testing.pages import hash_of

OTHER_NAMESPACE = bytes(range(32, 64))


class _Peer:
    is_up = True

    def __init__(self):
        self.stored, self.put_of, self.present_of = [], {}, {}

    def put(self, namespace_digest, pages):
        failure = self.put_of.get(namespace_digest, lambda: None)()
        if failure is None:
            self.stored.extend((namespace_digest, page.page_hash) for page in pages)
        return failure

    def present(self, namespace_digest, hashes):
        self.present_of.get(namespace_digest, lambda: None)()
        return [False] * len(hashes)


def _fail():
    raise ZeroDivisionError


def _page(namespace_digest, number):
    return CodedPage(namespace_digest, hash_of(number), b"coded", held_bytes=7, is_best=True)


class _Loop:
    def __init__(self):
        self.peer, self.released = _Peer(), []
        pages = types.SimpleNamespace(release=self.released.append)
        self.loop = SendLoop(self.peer, pages, lambda namespace, page_hash: b"coded", threading.Event())

    def send(self, *pages, is_back=False):
        for page in pages:
            self.loop.put(page)
        if is_back:
            self.loop.peer_is_back()
        self.loop.end()
        thread = threading.Thread(target=self.loop.run)
        thread.start()
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def test_of_a_batch_only_the_pages_of_the_put_that_failed_are_counted(delta):
    loop = _Loop()
    loop.peer.put_of[NAMESPACE] = _fail
    loop.send(_page(NAMESPACE, 0), _page(NAMESPACE, 1), _page(OTHER_NAMESPACE, 2))
    assert loop.peer.stored == [(OTHER_NAMESPACE, hash_of(2))]
    assert delta("kvcodec_publish_drops_total", reason="send_failed") == 2
    assert sum(loop.released) == 21


def test_what_was_kept_and_can_not_be_sent_is_counted_and_the_rest_is_sent(delta):
    loop = _Loop()
    away = PutFailure("peer_down", is_away=True)
    loop.peer.put_of = {NAMESPACE: lambda: away, OTHER_NAMESPACE: lambda: away}
    loop.peer.is_up = False
    loop.send(_page(NAMESPACE, 0), _page(OTHER_NAMESPACE, 1))
    assert loop.loop.kept_pages == counted("kvcodec_write_back_kept_pages") == 2
    loop.peer.is_up, loop.peer.put_of = True, {}
    loop.peer.present_of[NAMESPACE] = _fail
    loop.send(is_back=True)
    assert loop.peer.stored == [(OTHER_NAMESPACE, hash_of(1))]
    assert loop.loop.kept_pages == counted("kvcodec_write_back_kept_pages") == 0
    assert delta("kvcodec_publish_drops_total", reason="send_failed") == 1
