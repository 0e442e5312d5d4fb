"""The stages of a pipeline decide alike, whatever each knows and whenever the others hear of it."""

import collections
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kvcodec.plugin import pipeline
from sglang_kvcodec.plugin.pipeline import NOT_YET, Fetch, PipelineAgreement, UnjudgedLoads
from sglang_kvcodec.plugin.stage_link import MOST_REPORTED


class Wire:
    """Links of all stages in one thread; reports arrive when the test says so, decisions in order."""

    def __init__(self, stages):
        self.reports = [collections.deque() for _ in range(stages)]
        self.decisions = [collections.deque() for _ in range(stages)]
        self.links = [_Link(self, stage, stages) for stage in range(stages)]
        self.on_report = None

    def deliver(self, stage, count=None):
        reports = self.reports[stage]
        for _ in range(len(reports) if count is None else min(count, len(reports))):
            self.on_report(stage, *reports.popleft())


class _Link:
    def __init__(self, wire, stage, stages):
        self.wire, self.stage, self.stages = wire, stage, stages

    def report(self, kind, numbers):
        assert len(numbers) <= MOST_REPORTED
        self.wire.reports[self.stage].append((kind, list(numbers)))

    def listen(self, on_report):
        self.wire.on_report = on_report

    def decide(self, numbers):
        for stage in range(1, self.stages):
            self.wire.decisions[stage].append(list(numbers))

    def decision(self, count):
        numbers = self.wire.decisions[self.stage].popleft()
        assert len(numbers) == count
        return numbers


def agreements(stages=2, smallest=list, on_news=lambda: None):
    wire = Wire(stages)
    return wire, [PipelineAgreement(link, smallest, on_news) for link in wire.links]


def agree(parts, fetches, first_offload=0, offloads=None):
    """One pass at all stages, the first one first."""
    offloads = offloads or [[]] * len(parts)
    decided = [part.agree(fetches[i], first_offload, offloads[i]) for i, part in enumerate(parts)]
    assert all(each == decided[0] for each in decided)
    return decided[0]


def test_a_request_waits_for_what_has_not_been_heard():
    news = []
    wire, parts = agreements(on_news=lambda: news.append(1))
    ready = [[Fetch(0, 5, 5)], [Fetch(0, 3, 3)]]
    assert agree(parts, ready) == ([NOT_YET], [])
    assert not news
    wire.deliver(1)
    assert news
    assert agree(parts, ready) == ([3], [])


def test_a_stage_that_will_have_none_ends_the_waiting():
    wire, parts = agreements()
    fetches = [[Fetch(0, NOT_YET, 9)], [Fetch(0, NOT_YET, 0)]]
    agree(parts, fetches)
    wire.deliver(1)
    assert agree(parts, fetches) == ([0], [])


def test_only_news_is_reported():
    wire, parts = agreements()
    fetches = [[Fetch(0, NOT_YET, 9), Fetch(1, 2, 2)]] * 2
    for _ in range(3):
        agree(parts, fetches)
    assert len(wire.reports[1]) == 1


def test_more_news_than_a_report_holds():
    wire, parts = agreements()
    fetches = [[Fetch(number, 4, 4) for number in range(100)]] * 2
    offloads = [[True] * 150, [True] * 149 + [False]]
    agree(parts, fetches, 0, offloads)
    assert len(wire.reports[1]) > 2
    wire.deliver(1)
    assert agree(parts, fetches, 0, offloads) == ([4] * 100, offloads[1])


def test_an_offload_is_over_when_it_is_everywhere_and_succeeds_if_it_does_everywhere():
    wire, parts = agreements()
    offloads = [[True, True, True], [True, False]]
    agree(parts, [[], []], 7, offloads)
    wire.deliver(1)
    assert agree(parts, [[], []], 7, offloads) == ([], [True, False])
    # The next pass begins after them.
    assert agree(parts, [[], []], 9, [[True], []]) == ([], [])


def test_offloads_that_ended_without_a_word_are_not_taken_for_later_ones():
    wire, parts = agreements()
    agree(parts, [[], []], 0, [[], [True, True]])
    wire.deliver(1)
    # All were dropped by a flush; number 2 is the first of the next.
    assert agree(parts, [[], []], 2, [[True], []]) == ([], [])
    assert agree(parts, [[], []], 2, [[True], [False]]) == ([], [])
    wire.deliver(1)
    assert agree(parts, [[], []], 2, [[True], [False]]) == ([], [False])


def test_ranks_of_the_first_stage_hear_at_different_times():
    # The other rank of the first stage has not heard of the second request and of the second offload.
    def smallest(numbers):
        return [min(mine, other) for mine, other in zip(numbers, others.popleft(), strict=True)]

    others = collections.deque()
    wire, parts = agreements(smallest=smallest)
    fetches = [[Fetch(0, 5, 5), Fetch(1, 6, 6)]] * 2
    others.append([0, 5, 5, 6, 6])
    agree(parts, fetches, 0, [[True, True]] * 2)
    wire.deliver(1)
    others.extend([[1, 4, 4, NOT_YET, 6], [1]])
    assert agree(parts, fetches, 0, [[True, True]] * 2) == ([4, NOT_YET], [True])


@given(st.data())
def test_all_is_agreed_on_in_the_end_and_alike(data):
    """Three stages, each a few passes behind the one before; reports arrive late, pages and offloads come any time."""
    stages, requests, offload_count = 3, data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))
    wire, parts = agreements(stages)
    pages = [[data.draw(st.integers(0, 9)) for _ in range(requests)] for _ in range(stages)]
    succeeded = [[data.draw(st.booleans()) for _ in range(offload_count)] for _ in range(stages)]
    agreed = [{} for _ in range(stages)]
    settled = [[] for _ in range(stages)]
    passes = [0] * stages
    ready = [[False] * requests for _ in range(stages)]
    done = [0] * stages

    def is_over(stage):
        return len(agreed[stage]) == requests and len(settled[stage]) == offload_count

    for step in range(400):
        if all(is_over(stage) for stage in range(stages)):
            break
        late = step > 60
        stage = step % stages if late else data.draw(st.integers(0, stages - 1))
        if late or data.draw(st.booleans()):
            ready[stage] = [True] * requests
            done[stage] = offload_count
        elif requests:
            ready[stage][data.draw(st.integers(0, requests - 1))] = True
        if stage and (late or data.draw(st.booleans())):
            wire.deliver(stage, None if late else 1)
        # A stage does a pass after the stage before it.
        if is_over(stage) or (stage and passes[stage] >= passes[stage - 1]):
            continue
        waiting = [number for number in range(requests) if number not in agreed[stage]]
        fetches = [
            Fetch(number, pages[stage][number] if ready[stage][number] else NOT_YET, pages[stage][number])
            for number in waiting
        ]
        first = len(settled[stage])
        decided, successes = parts[stage].agree(fetches, first, succeeded[stage][first : done[stage]])
        agreed[stage] |= {n: each for n, each in zip(waiting, decided, strict=True) if each != NOT_YET}
        settled[stage] += successes
        passes[stage] += 1
    assert [is_over(stage) for stage in range(stages)] == [True] * stages
    expected = {number: min(each[number] for each in pages) for number in range(requests)}
    assert agreed == [expected] * stages
    assert settled == [[all(each) for each in zip(*succeeded, strict=True)]] * stages
    assert passes[0] >= 1 or not (requests or offload_count)


def request(barred=False):
    return types.SimpleNamespace(skip_radix_cache_insert=barred)


def loads(stages=2):
    wire, parts = agreements(stages)
    return wire, [UnjudgedLoads(part) for part in parts]


@pytest.mark.parametrize("landed", [(True, True), (True, False), (False, True), (False, False)])
def test_a_load_has_landed_if_it_has_at_all_stages(landed):
    wire, books = loads()
    reqs = [[request(), request(barred=True)] for _ in range(2)]
    for book, mine, here in zip(books, reqs, landed, strict=True):
        book.launched(mine, here)
        assert book
        # Nothing of it may get into the tree before it is known.
        assert all(req.skip_radix_cache_insert for req in mine)
    wire.deliver(1)
    for book, mine in zip(books, reqs, strict=True):
        assert book.judge([request(), *mine]) == (mine, all(landed))
        assert not book
        assert [req.skip_radix_cache_insert for req in mine] == [not all(landed), True]


def test_a_pass_without_a_load_is_nobodys_verdict():
    wire, books = loads()
    first, second = request(), request()
    for book in books:
        assert book.judge([first]) == ([], True)
        book.launched([first], landed=True)
        book.launched([second], landed=False)
        assert book.judge([request()]) == ([], True)
    wire.deliver(1)
    for book in books:
        assert book.judge([first]) == ([first], True)
        assert book.judge([second]) == ([second], False)


def test_a_stage_that_says_nothing_of_a_load_is_an_error(monkeypatch):
    monkeypatch.setattr(pipeline, "VERDICT_S", 0.01)
    _, books = loads()
    books[0].launched([req := request()], landed=True)
    with pytest.raises(RuntimeError, match="said nothing of a load"):
        books[0].judge([req])
