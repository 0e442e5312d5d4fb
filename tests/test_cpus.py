import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sglang_kvcodec.cpus import starting_on, take_place
from sglang_kvcodec.errors import ConfigurationError

MINE = os.sched_getaffinity(0)
ONE = {max(MINE)}


@pytest.fixture
def chosen():
    """Inside: threads are started on one CPU. Afterwards nothing is chosen any more."""
    with starting_on(ONE):
        yield
    with starting_on(set()):
        pass


def cpus_of(run):
    """Those of a thread that is started, and that does something first."""
    found = []

    def note():
        run()
        found.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=note)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.usefixtures("chosen")
def test_what_is_started_inside_runs_there():
    assert cpus_of(lambda: None) == ONE


def test_the_thread_that_starts_others_is_back_where_it_was_and_pools_grow_in_their_place():
    with starting_on(ONE):
        pass
    try:
        assert os.sched_getaffinity(0) == MINE
        assert cpus_of(lambda: None) == MINE
        with ThreadPoolExecutor(1, "kvcodec", take_place) as pool:
            assert pool.submit(os.sched_getaffinity, 0).result() == ONE
    finally:
        with starting_on(set()):
            pass
    assert cpus_of(take_place) == MINE


@pytest.mark.parametrize("cpus", [{9999}, {*MINE, 9999}])
def test_cpus_that_can_t_be_had_are_named(cpus):
    with pytest.raises(ConfigurationError, match=r"^this process can't run on CPU 9999$"), starting_on(cpus):
        pass
    assert os.sched_getaffinity(0) == MINE
    with starting_on(set()):
        pass
