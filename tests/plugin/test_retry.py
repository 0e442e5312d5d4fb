import types

from sglang_kvcodec.plugin import retry
from sglang_kvcodec.plugin.retry import RestoreFailed, RetryBook


def tokenized(rid="r", **changes):
    return types.SimpleNamespace(**{"rid": rid, "mm_inputs": None, "session_params": None, **changes})


def request(rid="r"):
    return types.SimpleNamespace(rid=rid, discard_output_reason=None)


class Scheduler:
    def __init__(self):
        self.started = []

    def handle_generate_request(self, given):
        self.started.append(given)


def test_a_request_is_started_once_more_with_its_own_input():
    book, scheduler, given, req = RetryBook(), Scheduler(), tokenized(), request()
    book.note(given)
    assert "r" in book
    book.mark_failed([req])
    assert isinstance(req.discard_output_reason, RestoreFailed)
    book.restart(req, scheduler)
    book.restart(req, scheduler)
    assert scheduler.started == [given]


def test_what_is_due_to_start_again_is_not_forgotten():
    # SGLang gives back what a chunked request holds before it says that it has ended.
    book, scheduler, given, req = RetryBook(), Scheduler(), tokenized(), request()
    book.note(given)
    book.mark_failed([req])
    book.forget("r")
    book.restart(req, scheduler)
    assert scheduler.started == [given]
    book.forget("r")
    assert "r" not in book


def test_what_can_not_be_started_twice_is_not_remembered():
    book = RetryBook()
    book.note(tokenized("image", mm_inputs=object()))
    book.note(tokenized("session", session_params=object()))
    book.note(tokenized(["a", "batch"]))
    assert "image" not in book
    assert "session" not in book
    failed = request("image")
    book.mark_failed([failed])
    assert failed.discard_output_reason is None


def test_a_forgotten_request_is_answered_as_sglang_would():
    book, scheduler, req = RetryBook(), Scheduler(), request()
    book.note(tokenized())
    book.forget("r")
    book.forget("r")
    book.mark_failed([req])
    book.restart(req, scheduler)
    assert req.discard_output_reason is None
    assert scheduler.started == []


def test_only_so_many_are_remembered(monkeypatch):
    monkeypatch.setattr(retry, "MAX_INPUTS", 2)
    book = RetryBook()
    for rid in "abc":
        book.note(tokenized(rid))
    assert [rid in book for rid in "abc"] == [False, True, True]


def test_a_second_start_is_known_as_one_until_it_is_over(monkeypatch):
    book, scheduler = RetryBook(), Scheduler()
    book.note(tokenized())
    assert not book.was_restarted("r")
    book.restart(request(), scheduler)
    book.note(tokenized())
    assert book.was_restarted("r")
    book.forget("r")
    assert not book.was_restarted("r")
    monkeypatch.setattr(retry, "MAX_INPUTS", 1)
    for rid in "ab":
        book.note(tokenized(rid))
        book.restart(request(rid), scheduler)
    assert [book.was_restarted(rid) for rid in "ab"] == [False, True]


def test_what_a_request_has_waited_for_is_kept_until_it_is_over(monkeypatch):
    monkeypatch.setattr(retry, "MAX_INPUTS", 1)
    book, wait = RetryBook(), object()
    book.admitted("unknown", wait)
    assert book.take_wait("unknown") is None
    book.note(tokenized())
    book.admitted("r", wait)
    assert book.take_wait("r") is wait
    assert book.take_wait("r") is None
    # Neither one whose pages have all come needs it, nor one that is forgotten for others.
    book.admitted("r", wait)
    book.forget("r")
    assert book.take_wait("r") is None
    book.note(tokenized())
    book.admitted("r", wait)
    book.note(tokenized("s"))
    assert book.take_wait("r") is None
