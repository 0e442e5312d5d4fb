"""Threads that leave the CPU to others."""

from __future__ import annotations

import logging
import os
import threading

logger = logging.getLogger(__name__)


def be_nice(niceness: int) -> None:
    """Lowers the priority of this thread alone, where the system can: on Linux a thread has a niceness of its own."""
    if hasattr(os, "setpriority"):
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        except OSError as error:
            logger.debug("kvcodec: %s keeps its priority: %s", threading.current_thread().name, error)
