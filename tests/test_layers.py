"""Holds the layers: imports go down only, never sideways, and each third-party library has one home."""

from __future__ import annotations

import ast
import pathlib
import sys

import pytest

PACKAGE = "sglang_kvcodec"
ROOT = pathlib.Path(__file__).parents[1] / PACKAGE

BASE = {"__init__", "errors", "config", "cpus", "interpreter", "metrics", "peer_metrics"}
PARTS = {"transform", "video", "storage"}
JOINTS = {"kernels", "rpc", "models", "calibration"}
MAY_USE = {
    **dict.fromkeys(BASE, BASE),
    "format": BASE,
    **{part: BASE | {"format"} for part in PARTS},
    "kernels": BASE | {"format", "transform"},
    "calibration": BASE | {"format", "transform"},
    "rpc": BASE | {"format", "storage"},
    "status": BASE | {"format", "rpc"},
    "models": BASE | {"format"},
    "flow": BASE | {"format"} | PARTS | {"kernels", "rpc", "calibration"},
    "evaluation": BASE | {"format"} | PARTS | JOINTS | {"flow"},
    "testing": BASE | {"format"} | PARTS | {"kernels", "rpc", "flow"},
    "latency": BASE | {"format", "rpc", "testing", "evaluation"},
    "plugin": BASE | {"format"} | PARTS | {"kernels", "rpc", "calibration", "flow"},
    "cli": BASE | {"format"} | PARTS | JOINTS | {"status", "flow", "testing", "evaluation", "latency"},
}
"""Layer -> the layers it may import besides itself. Nobody may import plugin or cli."""

HOMES = {
    "PyNvVideoCodec": {"video"},
    "aiohttp": {"status"},
    "av": {"video", "testing"},
    "google": {"format", "rpc"},
    "grpc": {"rpc"},
    "grpc_health": {"rpc"},
    "grpc_reflection": {"rpc"},
    "huggingface_hub": {"plugin"},
    "hypothesis": {"testing"},
    "lmdb": {"storage"},
    "lz4": {"evaluation"},
    "matplotlib": {"evaluation", "latency"},
    "obstore": {"storage"},
    "prometheus_client": {"metrics", "peer_metrics", "cli", "rpc", "status", "plugin"},
    "pytest": {"testing"},
    "redis": {"storage"},
    "rich": {"cli"},
    "safetensors": {"format"},
    "sglang": {"plugin"},
    "torch": {"transform", "kernels", "calibration", "flow", "plugin", "testing", "models", "evaluation"},
    "tqdm": {"cli"},
    "transformers": {"models"},
    "triton": {"kernels"},
    "zstandard": {"evaluation"},
    "numpy": set(MAY_USE) - BASE,
}
"""Third-party module -> the layers that may import it. One that is not listed may be imported nowhere."""


def layer_of(module: str) -> str:
    """``sglang_kvcodec.rpc.client`` -> ``rpc``; the package itself is ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def imported_modules(module: str, is_package: bool, source: str) -> set[str]:
    """Absolute dotted names of all imports: relative ones, those inside functions and for type checkers too."""
    package = module if is_package else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            prefix = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, [prefix, node.module]))
            # `from sglang_kvcodec import rpc` imports a layer, `from sglang_kvcodec import __version__` does not
            names.update(f"{origin}.{alias.name}" if origin == PACKAGE else origin for alias in node.names)
    return names


def violations(module: str, is_package: bool, source: str) -> list[str]:
    """What ``module`` imports against the rules, in words."""
    layer = layer_of(module)
    found = []
    for name in sorted(imported_modules(module, is_package, source)):
        top = name.split(".")[0]
        if top == PACKAGE:
            target = layer_of(name)
            target = "__init__" if target.startswith("__") else target
            if target != layer and target not in MAY_USE.get(layer, set()):
                found.append(f"{module} ({layer}) imports {name} ({target})")
        elif top not in sys.stdlib_module_names and layer not in HOMES.get(top, set()):
            found.append(
                f"{module} ({layer}) imports {name}, which belongs to {sorted(HOMES.get(top, set())) or 'nobody'}"
            )
    return found


def modules() -> list[tuple[str, bool, pathlib.Path]]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        found.append((".".join(parts[:-1] if is_package else parts), is_package, path))
    return found


def test_every_layer_is_known():
    present = {layer_of(module) for module, _, _ in modules()}
    assert present <= set(MAY_USE)
    assert present >= {"errors", "config", "metrics", "format", "storage", "rpc", "plugin", "cli"}


@pytest.mark.parametrize(
    ("module", "is_package", "path"), modules(), ids=lambda value: value if "." in str(value) else ""
)
def test_imports_keep_to_the_layers(module, is_package, path):
    assert violations(module, is_package, path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    [
        ("sglang_kvcodec.format.spec", False, "import torch"),
        ("sglang_kvcodec.format.spec", False, "def f():\n    from torch.nn import functional"),
        ("sglang_kvcodec.format.spec", False, "from ..storage.base import StorageEngine"),
        ("sglang_kvcodec.format", True, "from ..storage.base import StorageEngine"),
        ("sglang_kvcodec.format", True, "from .. import rpc"),
        ("sglang_kvcodec.storage.lmdb", False, "import sglang_kvcodec.transform.exact"),
        ("sglang_kvcodec.storage.lmdb", False, "from sglang_kvcodec.rpc import peer_pb2"),
        ("sglang_kvcodec.rpc.client", False, "import typing\nif typing.TYPE_CHECKING:\n    import torch"),
        ("sglang_kvcodec.flow.fetcher", False, "import grpc.aio"),
        ("sglang_kvcodec.flow.fetcher", False, "import sglang.srt.server_args"),
        ("sglang_kvcodec.flow.fetcher", False, "from sglang_kvcodec import plugin"),
        ("sglang_kvcodec.plugin.cache", False, "from sglang_kvcodec.cli import main"),
        ("sglang_kvcodec.cli.main", False, "try:\n    import sglang\nexcept ImportError:\n    pass"),
        ("sglang_kvcodec.cli.main", False, "import left_pad"),
        ("sglang_kvcodec.errors", False, "from sglang_kvcodec.format import spec"),
        ("sglang_kvcodec.config", False, "import numpy"),
        ("sglang_kvcodec.unheard_of.module", False, "import sglang_kvcodec.errors"),
    ],
)
def test_a_violation_is_caught(module, is_package, source):
    assert len(violations(module, is_package, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sglang_kvcodec.format.spec", "import struct\nfrom sglang_kvcodec.errors import FormatError"),
        ("sglang_kvcodec.format.spec", "from . import digest\nfrom .. import __version__\nfrom ..config import MIB"),
        ("sglang_kvcodec.rpc.server", "import grpc.aio\nfrom ..storage.base import StorageEngine"),
        ("sglang_kvcodec.kernels.restore", "import torch, triton\nfrom sglang_kvcodec.transform import base"),
        (
            "sglang_kvcodec.plugin.cache",
            "from sglang.srt.mem_cache import registry\nimport sglang_kvcodec.flow.fetcher",
        ),
    ],
)
def test_what_is_allowed_passes(module, source):
    assert violations(module, False, source) == []
