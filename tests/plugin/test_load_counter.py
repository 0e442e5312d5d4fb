import threading

from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.plugin.load_counter import EventLoadCounter

LIMIT_S = 30


class Stream:
    """A CUDA stream that only remembers what it was told to wait for."""

    def __init__(self, handle):
        self.cuda_stream = handle
        self.events = []

    def wait_event(self, event):
        self.events.append(event)


def counter_of(layers=7):
    forward = Stream(1)
    counter = EventLoadCounter(layers, lambda: counter.current)
    counter.current = forward
    index = counter.update_producer()
    counter.set_consumer(index)
    return counter, index, forward


def test_the_stream_waits_for_each_layers_events_once():
    counter, index, forward = counter_of()
    counter.complete_after(index, range(3), ["k0", "v0"])
    for _ in range(2):
        counter.wait_until(0)
        assert forward.events == ["k0", "v0"]
    counter.complete_after(index, range(3, 6), ["k3", "v3"])
    counter.wait_until(2)
    assert forward.events == ["k0", "v0"]
    counter.wait_until(4)
    assert forward.events == ["k0", "v0", "k3", "v3"]


def test_a_graph_that_waits_for_the_last_layer_alone_waits_for_all():
    counter, index, forward = counter_of()
    for first in (0, 3, 6):
        counter.complete_after(index, range(first, min(7, first + 3)), [first, -first])
    counter.wait_until(6)
    assert forward.events == [0, 0, 3, -3, 6, -6]
    assert counter.finish(index, forward)
    assert len(forward.events) == 6


def test_each_stream_waits_for_itself():
    counter, index, forward = counter_of()
    counter.complete_after(index, range(7), ["k", "v"])
    counter.wait_until(0)
    counter.current = other = Stream(2)
    counter.wait_until(0)
    assert forward.events == other.events == ["k", "v"]


def test_slots_are_given_back_after_the_restore_of_layers_nobody_asked_for():
    counter, index, forward = counter_of()
    counter.current = other = Stream(2)
    for layer in range(7):
        counter.complete_after(index, range(layer, layer + 1), [layer])
    counter.wait_until(1)
    assert counter.finish(index, forward)
    assert forward.events == other.events == list(range(7))
    # Nothing of the batch is kept.
    counter.wait_until(3)
    assert len(other.events) == 7


def test_the_launching_thread_waits_for_a_layer_that_is_not_on_its_way_yet():
    counter, index, forward = counter_of()
    waited = threading.Event()

    def launch():
        counter.wait_until(0)
        waited.set()

    thread = threading.Thread(target=launch)
    thread.start()
    assert not waited.wait(0.05)
    counter.complete_after(index, range(7), ["event"])
    thread.join(LIMIT_S)
    assert waited.is_set()
    assert forward.events == ["event"]


def test_a_failure_lets_the_forward_pass_go_on_and_is_reported():
    counter, index, forward = counter_of()
    counter.complete_after(index, range(3), ["first"])
    counter.fail(index, CodecError("no"))
    counter.wait_until(6)
    assert forward.events == ["first"]
    assert not counter.finish(index, forward)


def test_layers_without_events_are_in_the_pool_already():
    counter, index, forward = counter_of()
    counter.complete_after(index, range(7), [])
    counter.wait_until(6)
    assert counter.finish(index, forward)
    assert forward.events == []


def test_batches_are_apart_and_a_batch_without_a_load_waits_for_nothing():
    counter, first, forward = counter_of()
    second = counter.update_producer()
    counter.complete_after(second, range(7), ["second"])
    counter.complete_after(first, range(7), ["first"])
    counter.wait_until(6)
    assert forward.events == ["first"]
    counter.set_consumer(second)
    counter.wait_until(6)
    assert forward.events == ["first", "second"]
    counter.set_consumer(-1)
    counter.wait_until(6)
    assert counter.finish(first, forward)
    assert counter.finish(second, forward)
    assert counter.finish(-1, forward)
    assert forward.events == ["first", "second"]
    counter.reset()
    assert counter.producer_index == -1
