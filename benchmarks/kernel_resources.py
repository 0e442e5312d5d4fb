"""What the kernels take of a GPU that need not be there: registers, spills, shared memory, and bytes for each value.

Compiles each kernel for sm_90 at the shape of a model with 8 KV heads x 128, pages of 64 tokens and a bfloat16 pool,
and reads what ``ptxas`` says. Bytes are counted from the shape; what several programs read again from the caches does
not count. Nothing is run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import triton
from record import record
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups
from sglang_kvcodec.kernels import digest, exact_pack, high_pack, klt, klt_pack, open_restore, restore
from sglang_kvcodec.kernels.planes import planes_of
from sglang_kvcodec.testing.calibrations import neox_rope, random_calibration
from sglang_kvcodec.testing.synthetic import kv_like
from sglang_kvcodec.transform import PackedSide, get_transform
from sglang_kvcodec.transform.klt import KltTransform

PAGES = 64
"""4096 tokens."""


class AbsentGPU:
    """What Triton asks its driver before it compiles."""

    def get_current_device(self) -> int:
        """Its number; Triton keeps what it compiled by it."""
        return 90

    def get_current_stream(self, device: int) -> int:
        """None."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Hopper."""
        return GPUTarget("cuda", 90, 32)


class Compiling:
    """In the place of a kernel: compiles for the arguments it is launched with, and has an effect of its own."""

    def __init__(self, kernel: Any, effect: Callable[[dict[str, Any]], object]) -> None:
        self._kernel = kernel
        self._effect = effect
        self.compiled: list[Any] = []

    def __getitem__(self, grid: object) -> Any:
        def launch(**arguments: Any) -> None:
            self.compiled.append(self._kernel.warmup(grid=grid, **arguments))
            self._effect(arguments)

        return launch


def resources(compiled: Any) -> dict[str, int]:
    """Registers and bytes of spills of a thread, warps and shared bytes of a program, from its cubin and PTX."""
    ptxas = triton.knobs.nvidia.ptxas.path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [ptxas, "-v", "--gpu-name", "sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {name: re.search(pattern, said) for name, pattern in _PATTERNS.items()}
    numbers = {name: int(match[1]) if match else 0 for name, match in found.items()}
    ptx = compiled.asm["ptx"]
    return numbers | {
        "warps": compiled.metadata.num_warps,
        "stages": compiled.metadata.num_stages,
        "shared_bytes": compiled.metadata.shared,
        "tensor_core_instructions": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
        "asynchronous_copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "widest_global_store_bits": max(
            (int(m[1] or 1) * int(m[2]) for m in re.finditer(r"st\.global(?:\.v(\d))?\.b(\d+)", ptx)), default=0
        ),
    }


_PATTERNS = {
    "registers": r"Used (\d+) registers",
    "spill_store_bytes": r"(\d+) bytes spill stores",
    "spill_load_bytes": r"(\d+) bytes spill loads",
}


_EFFECTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "_read_values": lambda arguments: arguments["is_bad"].zero_(),
    "_write_codes": lambda arguments: arguments["escapes"].fill_(1),
    "_first_steps": lambda arguments: arguments["escaped"].fill_(1),
    "_write_high": lambda arguments: arguments["counts"].zero_(),
}
"""What a launch that only compiles has to leave behind: values that can be coded, and escapes to list."""


def compile_launches(module: Any, names: list[str], launch: Any) -> dict[str, Any]:
    """The first kernel compiled under each name while ``launch`` runs."""
    kernels = {name: getattr(module, name) for name in names}
    stand_ins = {
        name: Compiling(kernel, _EFFECTS.get(name, lambda arguments: None)) for name, kernel in kernels.items()
    }
    for name, stand_in in stand_ins.items():
        setattr(module, name, stand_in)
    try:
        launch()
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
    return {name: stand_in.compiled[0] for name, stand_in in stand_ins.items() if stand_in.compiled}


def klt_rows(layers_per_block: int) -> list[dict[str, object]]:
    """The kernels of a calibrated tier for K."""
    spec = KVSpec(layers_per_block, 8, 128, 64, KVDtype.BFLOAT16)
    width = layers_per_block * spec.channels
    # The shape counts, not the numbers: a basis of three layers takes long to make at random.
    calibration = random_calibration(
        KVSpec(layers_per_block, 8, 128, 64, KVDtype.BFLOAT16), layers_per_block=layers_per_block, rope=neox_rope(128)
    )
    group = layer_groups(spec)[0]
    packed = KltTransform(spec, calibration, "high").pack(group, Side.KEY, kv_like(spec, 1, group.layers, 0), [64])
    assert packed is not None
    with_escape = [PackedSide(each.canvas, each.stored, _ESCAPE, each.steps) for each in packed]
    kernel = klt.KltRestore(spec, calibration, "high", "cpu")
    buffers = [torch.empty((64, 8, 128), dtype=torch.bfloat16) for _ in range(group.layers)]
    names = ["_read_codes", "_write_escapes", "_read_far_escapes", "_restore_klt_tile"]
    compiled = compile_launches(
        klt,
        names,
        lambda: kernel.restore(group, Side.KEY, with_escape, [64], torch.arange(64), buffers),
    )
    basis = kernel.bases[group.index, Side.KEY]
    values = PAGES * 64 * width
    code_bytes = 2 * PAGES * 64 * basis.columns
    moved = {
        "_read_codes": values + PAGES * len(packed[0].stored) + code_bytes,
        "_write_escapes": 0,
        "_read_far_escapes": 0,
        "_restore_klt_tile": code_bytes
        + basis.synthesis.nbytes
        + basis.means.nbytes
        + PAGES * 64 * (2 * 64 * 4 + 4 * basis.blocks + 8)
        + 2 * values,
    }
    return [
        {
            "kernel": name.strip("_"),
            "layers_per_block": layers_per_block,
            **resources(each),
            "bytes_per_value": round(moved[name] / values, 3),
            "columns": basis.columns,
            "components": basis.components,
            "flop_per_value": 2 * basis.columns if name == "_restore_klt_tile" else 0,
        }
        for name, each in compiled.items()
    ]


def klt_pack_rows(layers_per_block: int) -> list[dict[str, object]]:
    """The kernels that pack K of a calibrated tier."""
    spec = KVSpec(layers_per_block, 8, 128, 64, KVDtype.BFLOAT16)
    calibration = random_calibration(spec, layers_per_block=layers_per_block, rope=neox_rope(128), gain_components=8)
    group = layer_groups(spec)[0]
    kernel = klt_pack.KltPack(spec, calibration, "high", "cpu")
    buffers = [torch.zeros((64, 8, 128), dtype=torch.bfloat16) for _ in range(group.layers)]
    compiled = compile_launches(
        klt_pack,
        ["_read_values", "_analyse", "_write_codes", "_list_escapes"],
        lambda: kernel.pack(group, Side.KEY, [64], torch.arange(64), buffers),
    )
    basis, tables = kernel.bases[group.index, Side.KEY], kernel.tables[group.index, Side.KEY]
    rows = PAGES * 64
    values = rows * layers_per_block * spec.channels
    scratch, components = 4 * rows * len(basis.tiles) * klt_pack.TILE_VALUES, 4 * rows * basis.columns
    low_bytes = PAGES * basis.low_rows * 8
    moved = {
        "_read_values": 2 * values + rows * (2 * 64 * 4 + 8) + tables.metrics.nbytes + basis.means.nbytes + scratch,
        "_analyse": scratch + basis.synthesis.nbytes + components,
        "_write_codes": components + 4 * rows * basis.blocks + PAGES * kernel.geometry.picture_bytes + low_bytes,
        "_list_escapes": 0,
    }
    flop_per_value = {"_read_values": 3 * 2 * spec.head_dim, "_analyse": 2 * 2 * basis.columns}
    return [
        {
            "kernel": name.strip("_"),
            "layers_per_block": layers_per_block,
            **resources(each),
            "bytes_per_value": round(moved[name] / values, 3),
            "columns": basis.columns,
            "components": basis.components,
            "flop_per_value": flop_per_value.get(name, 0),
        }
        for name, each in compiled.items()
    ]


def exact_pack_row() -> dict[str, object]:
    """The kernel that packs exact pages."""
    spec = KVSpec(1, 8, 128, 64, KVDtype.BFLOAT16)
    kernel = exact_pack.ExactPack(spec)
    buffers = [torch.zeros((64, 8, 128), dtype=torch.bfloat16)]
    compiled = compile_launches(
        exact_pack,
        ["_pack_exact"],
        lambda: kernel.pack(layer_groups(spec)[0], Side.KEY, [0], torch.arange(64), buffers),
    )["_pack_exact"]
    # The canvas is filled before; exponents and residuals are a byte each.
    return {"kernel": "pack_exact", **resources(compiled), "bytes_per_value": 2 + 1 + 1 + 1.0}


_ESCAPE = b"".join(number.to_bytes(4, "little") for number in (0, 1, 200, 1 << 22))
"""Of two components: one that a code can hold, and one that none can."""


def identity_rows() -> list[dict[str, object]]:
    """The kernels of the profiles without a calibration."""
    spec = KVSpec(1, 8, 128, 64, KVDtype.BFLOAT16)
    rows: list[dict[str, object]] = []
    for profile, bytes_per_value in (("high", 1 + 2), ("exact", 2 + 2)):
        values = kv_like(spec, 1, 1, 0)
        if profile == "high":
            values[0, 0, 0, 0, 0] = 3e4
        packed = get_transform(profile, spec).pack(values)
        name = f"_restore_{profile}_layer"
        kernel = open_restore(profile, spec)
        assert kernel is not None
        buffers = [torch.empty((64, 8, 128), dtype=torch.bfloat16)]

        def launch(kernel: Any = kernel, packed: Any = packed, buffers: Any = buffers) -> None:
            kernel.restore(packed, torch.arange(64), buffers)

        for found, compiled in compile_launches(restore, [name, "_write_high_escapes"], launch).items():
            moved = float(bytes_per_value) if found == name else 0.0
            rows.append({"kernel": found.strip("_"), **resources(compiled), "bytes_per_value": moved})
    return rows


def high_pack_rows() -> list[dict[str, object]]:
    """The kernels that pack ``high`` without a calibration; each pass reads the slots again."""
    spec = KVSpec(1, 8, 128, 64, KVDtype.BFLOAT16)
    kernel = high_pack.HighPack(spec, "cpu")
    buffers = [torch.zeros((64, 8, 128), dtype=torch.bfloat16)]
    moved = {
        "_channel_means": 2.0,
        "_signal_sums": 2.0,
        "_first_steps": 0.0,
        "_noise_sums": 2.0,
        "_choose_steps": 0.0,
        "_write_high": 3.0,
        "_list_high_escapes": 0.0,
    }
    compiled = compile_launches(
        high_pack,
        list(moved),
        lambda: kernel.pack(layer_groups(spec)[0], Side.KEY, [0], torch.arange(64), buffers),
    )
    return [
        {"kernel": name.strip("_"), "packs": "high", **resources(each), "bytes_per_value": moved[name]}
        for name, each in compiled.items()
    ]


def digest_row() -> dict[str, object]:
    """The kernel that checks decoded pictures."""
    planes = planes_of(torch.zeros((2, 384, 512), dtype=torch.uint8))
    compiled = compile_launches(digest, ["_add_digest"], lambda: digest.plane_digests(planes, 512, 256))["_add_digest"]
    return {"kernel": "add_digest", **resources(compiled), "bytes_per_value": 1.0}


def main() -> None:
    """Prints a row for each kernel; stores them if told to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="keep the figures in benchmarks/results")
    arguments = parser.parse_args()
    driver.set_active(AbsentGPU())
    rows = [*identity_rows(), *klt_rows(1), *klt_rows(3), digest_row()]
    rows += [exact_pack_row(), *high_pack_rows(), *klt_pack_rows(1), *klt_pack_rows(3)]
    for row in rows:
        print(json.dumps(row))
    if arguments.record:
        print(record("kernel-resources", rows), file=sys.stderr)


if __name__ == "__main__":
    main()
