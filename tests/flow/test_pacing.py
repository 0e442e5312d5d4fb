import dataclasses
import threading

import pytest

from sglang_kvcodec.flow.pacing import (
    ANSWER_SHARE,
    FIRST_BYTE,
    LOOKUP,
    LOST_SHARE,
    MAX_PATIENCE_S,
    MIN_ANSWER_S,
    MIN_PATIENCE_S,
    PATIENCE_SHARE,
    PROGRESS,
    SILENCE,
    SILENCE_S,
    SILENCE_SHARE,
    Flight,
    Pacer,
    Stage,
    patience_s,
)
from sglang_kvcodec.flow.prediction import NOTHING_KNOWN, Knowledge, Prefix
from sglang_kvcodec.flow.prefill_meter import PrefillModel
from sglang_kvcodec.flow.restore_meter import RestoreModel

PREFILL = PrefillModel(0.0, 1e-3, 0.0)
FREE = RestoreModel(0.0, 0.0, 2, 32, 1, 1)
PREFIX = Prefix([1000] * 20, 50, 7, 1017)
"""1010 tokens to compute, of which 1000 are being fetched: 1.01 s, or 20 kB and 0.01 s."""


def known(bytes_per_s, **changes):
    return dataclasses.replace(Knowledge(0.001, bytes_per_s, (), FREE, PREFILL), **changes)


def progress(received_bytes=0, whole_pages=0):
    return Stage(PROGRESS, 0.0, PREFIX, received_bytes, whole_pages)


@pytest.mark.parametrize("stage", [progress(), Stage(LOOKUP, 0.0, PREFIX), Stage(FIRST_BYTE, 0.0, PREFIX)])
def test_nothing_is_given_up_while_prefill_is_not_known(stage):
    assert patience_s(stage, NOTHING_KNOWN, 1e9) is None
    assert patience_s(stage, known(1.0, prefill=None), 1e9) is None


@pytest.mark.parametrize("phase", [LOOKUP, FIRST_BYTE])
def test_an_answer_may_take_a_share_of_the_prefill(phase):
    stage = Stage(phase, 10.0, dataclasses.replace(PREFIX, page_bytes=[]))
    allowed_s = 1.01 * ANSWER_SHARE
    assert patience_s(stage, known(None), 10.0 + allowed_s - 0.01) == pytest.approx(0.01)
    assert patience_s(stage, known(None), 10.0 + allowed_s + 0.01) < 0
    brief = dataclasses.replace(PREFIX, tokens_before=1016)
    assert patience_s(Stage(phase, 10.0, brief), known(None), 10.0) == pytest.approx(MIN_ANSWER_S)
    far = known(None, round_trip_s=0.3)
    assert patience_s(stage, far, 10.0) == pytest.approx(1.2)


def test_a_slow_link_needs_time_for_the_headers():
    stage = Stage(FIRST_BYTE, 0.0, PREFIX)
    assert patience_s(stage, known(1000.0), 0.0) == pytest.approx(1.01 * ANSWER_SHARE + 2.0)


def test_a_fetch_that_is_faster_than_computing_is_waited_for():
    # 20 kB in 0.5 s and 0.01 s, against 1.01 s.
    assert patience_s(progress(), known(40_000), 1e9) is None
    assert patience_s(progress(), known(None), 1e9) is None


def test_a_fetch_that_has_become_slower_is_given_up_after_a_moment():
    assert patience_s(progress(), known(10_000), 0.0) == pytest.approx(1.01 * PATIENCE_SHARE)
    long = dataclasses.replace(PREFIX, prompt_tokens=10**6)
    assert patience_s(Stage(PROGRESS, 0.0, long), known(0.0), 0.0) == MAX_PATIENCE_S


def test_what_has_arrived_counts():
    assert patience_s(progress(15_000), known(10_000), 0.0) is None
    # The last 5 kB take 0.5 s, and computing them would take 0.25 s.
    assert patience_s(progress(15_000, 15), known(10_000), 0.0) == pytest.approx(MIN_PATIENCE_S)
    assert patience_s(progress(20_000, 19), known(10_000), 0.0) is None


def test_what_others_have_yet_to_receive_counts():
    assert patience_s(progress(), known(40_000, others_bytes=[10**9]), 0.0) is None
    assert patience_s(progress(), known(40_000, others_bytes=[10**9, 10**9]), 0.0) is not None


def test_a_pause_is_forgiven_and_a_stop_is_not():
    given_up = []
    flight = Flight(progress(), given_up.append)
    slow, fast = known(10_000), known(40_000)
    for now_s, now_known in [(0.0, slow), (0.04, slow), (0.05, fast), (0.1, slow), (0.14, slow)]:
        flight.judge(now_known, now_s)
    assert given_up == []
    flight.judge(slow, 0.16)
    flight.judge(slow, 9.0)
    assert given_up == [PROGRESS]


def test_the_others_are_all_but_oneself():
    pacer = Pacer(lambda profile_name: known(1e6), is_watching=False)
    flights = [Flight(progress(), lambda phase: None) for _ in range(3)]
    for flight, received in zip(flights, (0, 19_000, 20_000), strict=True):
        pacer.add(flight)
        flight.progress(received, 0)
    assert pacer.knowledge(flights[0]).others_bytes == [1_000]
    pacer.remove(flights[0])
    assert pacer.knowledge(flights[1]).others_bytes == []
    pacer.close()


def test_who_plans_sees_those_that_wait_for_their_turn():
    pacer = Pacer(lambda profile_name: known(1e6), is_watching=False)
    receiving = Flight(progress(), lambda phase: None)
    waiting, planning = (Flight(Stage(LOOKUP, 0.0, PREFIX), lambda phase: None) for _ in range(2))
    for flight in (receiving, waiting, planning):
        pacer.add(flight)
    receiving.progress(19_000, 0)
    assert pacer.knowledge(planning).others_bytes == [1_000]
    waiting.queued_bytes = 7_000
    assert pacer.knowledge(planning).others_bytes == [1_000, 7_000]
    # They don't share the link yet.
    assert pacer.knowledge(receiving).others_bytes == []
    waiting.begin(FIRST_BYTE, 1.0)
    assert pacer.knowledge(receiving).others_bytes == [20_000]
    pacer.close()


def test_a_fetch_that_nobody_waits_for_is_not_judged():
    given_up = []
    flight = Flight(progress(), given_up.append)
    flight.unwatched()
    # A block of its own, of which less is left than of the one before.
    flight.progress(0, 20)
    flight.begin(PROGRESS, 0.0, dataclasses.replace(PREFIX, page_bytes=[1000] * 2))
    for now_s in (0.0, 100.0):
        flight.judge(known(1.0), now_s)
    assert not given_up


def test_another_prefix_may_be_shorter_than_what_has_arrived_of_the_last_one():
    stage = dataclasses.replace(progress(0, 20), prefix=dataclasses.replace(PREFIX, page_bytes=[1000] * 2))
    assert patience_s(stage, known(1.0), 0.0) is not None


def test_an_error_in_one_fetch_leaves_the_others_watched(caplog):
    judged = threading.Event()

    class Broken(Flight):
        def judge(self, known, now_s):
            raise IndexError("more than there are")

    class Sound(Flight):
        def judge(self, known, now_s):
            judged.set()

    pacer = Pacer(lambda name: known(1.0))
    try:
        for kind in (Broken, Sound):
            pacer.add(kind(progress(), lambda phase: None))
        assert judged.wait(30)
        judged.clear()
        assert judged.wait(30)
    finally:
        pacer.close()
    assert "can't be compared" in caplog.text


def test_what_is_queued_of_an_admitted_request_is_its_own():
    restore = RestoreModel(0.0, 30e-6, 2, 32, 1, 1)
    # 0.6 s to restore, and all of it is queued.
    stage = dataclasses.replace(progress(20_000, 20), is_promised=True)
    facts = known(1e9, restore=dataclasses.replace(restore, queued_s=0.6))
    assert patience_s(stage, facts, 0.0) is None


def test_who_is_in_a_batch_is_given_up_for_what_is_missing_only():
    # Decoding takes 1.4 s and computing 1.01: it should not have been fetched, but most of it is restored by now.
    state = known(1e6, restore=RestoreModel(0.0, 7e-5, 20, 32, 1, 10), overlaps=True)
    stage = dataclasses.replace(progress(15_000, 15), last_block_bytes=20_000)
    promised = dataclasses.replace(stage, is_promised=True)
    assert patience_s(stage, state, 0.0) is not None
    assert patience_s(promised, state, 0.0) is None
    assert patience_s(promised, dataclasses.replace(state, bytes_per_s=4_000), 0.0) is not None
    # The first layers of these are not there yet.
    begun = dataclasses.replace(promised, received_bytes=1_000)
    assert patience_s(begun, state, 0.0) is not None


def followed(flight, received, known_at=None, period_s=0.02):
    """Judges once in a while, with so much received each time; when it was given up, if it was."""
    given_up = []
    flight._give_up = given_up.append
    for index, size in enumerate(received):
        flight.progress(size, 0)
        flight.judge(known_at(index) if known_at else known(40_000), index * period_s)
        if given_up:
            return given_up[0], index * period_s
    return None


def turnable(stage=None):
    flight = Flight(stage or progress(), lambda phase: None)
    flight.may_turn = True
    return flight


FLOWS = [800 * step for step in range(6)]
"""As much as the link brings, 40 kB a second."""


def test_silence_is_not_waited_out_where_the_other_end_can_be_fetched():
    phase, at_s = followed(turnable(), FLOWS + [FLOWS[-1]] * 50)
    assert phase == SILENCE
    # What has come of pages that are not whole, 4 kB, is worth as little.
    assert at_s == pytest.approx(0.1 + SILENCE_S, abs=0.021)
    assert followed(Flight(progress(), None), FLOWS + [FLOWS[-1]] * 50) is None


def test_a_last_message_is_not_what_ends_silence():
    # One message where five should have come.
    assert followed(turnable(), [*FLOWS, 4000, 4000, 4000, 4000, 4800, 4800])[0] == SILENCE
    assert followed(turnable(), [*FLOWS, 4000, 4000, 5600, 5600, 5600, 7200, 7200, 8800, 8800, 8800, 10400]) is None


def test_what_would_be_lost_is_waited_for():
    # 18 kB of pages that are not whole take 0.45 s to fetch again.
    received = [*FLOWS[:1], 18_000]
    _, at_s = followed(turnable(), received + [18_000] * 50)
    assert at_s == pytest.approx(0.02 + LOST_SHARE * 0.45, abs=0.03)


def test_others_on_the_link_have_their_turns():
    _, alone_s = followed(turnable(), FLOWS + [FLOWS[-1]] * 50)
    _, shared_s = followed(turnable(), FLOWS + [FLOWS[-1]] * 50, lambda _: known(40_000, others_bytes=[10**6]))
    assert shared_s > alone_s


def test_silence_is_told_by_what_the_link_was():
    # The meter has noticed too, and what is left would still come sooner than it could be computed.
    slow_after = lambda index: known(40_000 if index < 8 else 18_000)  # noqa: E731
    flight = turnable()
    assert followed(flight, FLOWS + [FLOWS[-1]] * 50, slow_after)[0] == SILENCE
    assert flight.given_up_at_bytes_per_s == 40_000 * SILENCE_SHARE


def test_a_link_that_was_always_slow_is_not_silent():
    # A message of 2 kB each fifth of a second, and it is known.
    received = [2000 * (index // 10) for index in range(100)]
    slow = known(10_000, prefill=PrefillModel(0.0, 1.0, 0.0), message_bytes=2000)
    assert followed(turnable(), received, lambda _: slow) is None


def test_a_phase_begins_anew():
    flight = turnable()
    assert followed(flight, [0] * 5) is None
    flight.begin(PROGRESS, 0.1)
    assert followed(flight, FLOWS) is None
    waiting = turnable(Stage(FIRST_BYTE, 0.0, PREFIX))
    # There an answer may take its share of the prefill.
    assert followed(waiting, [0] * 12) is None
