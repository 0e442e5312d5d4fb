"""The environment of processes that this layer starts."""

from __future__ import annotations

import os
import pathlib

_PACKAGE_PARENT = pathlib.Path(__file__).parents[2]
_METRICS = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")


def child_environment() -> dict[str, str]:
    """This process's, so that the child finds this package, computes on one thread and leaves the metrics alone.

    SGLang has its processes write their metrics into one directory. A child there would add gauges of its own, at zero:
    the least of them all is what ``kvcodec_peer_up`` shows.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _METRICS}
    paths = filter(None, [str(_PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")])
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
