"""One interpreter, many threads: those that work for requests in the background take turns."""

import threading

BACKGROUND_TURN = threading.Lock()
"""Held by a thread while it prepares work for a device, in Python, and never while it waits for anything.

The interpreter lets one thread run at a time. NumPy and torch give its lock up in nearly every call, so threads that
prepare work at the same time take it from each other a hundred times for each part of it, and the scheduler's thread
stands in the same queue. Taking turns costs no throughput and cuts what a short piece of work of another thread takes to
a third, and to a twelfth in the slowest cases (``benchmarks/bench_turns.py``: 14 threads, two cores).
"""
