"""One interpreter, many threads: those that work for requests in the background take turns."""

import threading

BACKGROUND_TURN = threading.Lock()
"""Held by a thread while it prepares work for a device, in Python, and never while it waits for anything.

The interpreter lets one thread run at a time. NumPy and torch give its lock up in nearly every call, so threads that
prepare work at the same time take it from each other a hundred times for each part of it, and the scheduler's thread
stands in the same queue. Fourteen that do as a decoder's does get 43 % more done on two cores when they take turns, and
a short piece of work beside them takes a fifth of the time (``benchmarks/bench_turns.py``).
"""
