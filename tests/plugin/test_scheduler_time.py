import types

from prometheus_client import REGISTRY

from sglang_kvcodec.plugin import scheduler_time
from sglang_kvcodec.plugin.scheduler_time import SchedulerTime, timed


def observed():
    return tuple(REGISTRY.get_sample_value(f"kvcodec_scheduler_seconds_{what}") for what in ("count", "sum"))


class Works:
    def __init__(self, clock):
        self.scheduler_time = SchedulerTime()
        self._clock = clock

    @timed
    def inner(self, seconds):
        """Inner."""
        self._clock[0] += seconds
        return seconds

    @timed
    def outer(self, seconds):
        self._clock[0] += 1
        return self.inner(seconds)

    @timed
    def fails(self):
        self._clock[0] += 2
        raise KeyError


def test_time_inside_is_counted_once_and_pass_by_pass(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(scheduler_time, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    works = Works(clock)
    count, total = observed()
    works.scheduler_time.next_pass()
    assert observed() == (count, total)
    assert works.outer(3) == 3
    clock[0] += 50
    assert works.inner(seconds=0.5) == 0.5
    try:
        works.fails()
    except KeyError:
        clock[0] += 7
    works.scheduler_time.next_pass()
    works.scheduler_time.next_pass()
    assert observed() == (count + 1, total + 1 + 3 + 0.5 + 2)
    assert works.inner.__doc__ == "Inner."
