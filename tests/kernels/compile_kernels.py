"""Compiles the kernels as their launches would, for GPUs that need not be there; prints a line for each."""

import dataclasses
import sys

import torch
from kernel_kit import hard_values
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sglang_kvcodec.format.spec import KVDtype, KVSpec, Side, layer_groups
from sglang_kvcodec.kernels import digest, exact_pack, high_pack, klt, klt_pack, open_restore, restore
from sglang_kvcodec.kernels.planes import planes_of
from sglang_kvcodec.testing.calibrations import neox_rope, random_calibration
from sglang_kvcodec.transform import get_transform
from sglang_kvcodec.transform.floats import torch_dtype
from sglang_kvcodec.transform.klt import KltTransform

CASES = [("high", KVDtype.BFLOAT16), ("high", KVDtype.FLOAT16), *(("exact", dtype) for dtype in KVDtype)]
HIGH_PACKED = [(KVDtype.BFLOAT16, (4, 8, 128, 64)), (KVDtype.FLOAT16, (2, 3, 21, 17))]
CALIBRATED = [
    (KVDtype.BFLOAT16, (4, 2, 128, 64), neox_rope(128), Side.KEY),
    (KVDtype.FLOAT8_E4M3, (2, 3, 21, 17), neox_rope(21, 6), Side.KEY),
    (KVDtype.FLOAT16, (2, 2, 64, 16), dataclasses.replace(neox_rope(64), is_interleaved=True), Side.KEY),
    (KVDtype.FLOAT8_E5M2, (1, 2, 64, 16), None, Side.VALUE),
]


class AbsentGPU:
    """What Triton asks its driver before it compiles."""

    def __init__(self, capability):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return self._target.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self._target


class CompileOnly:
    """In the place of a kernel: compiles for the arguments it is launched with, and has an effect of its own."""

    def __init__(self, kernel, effect=lambda arguments: None):
        self._kernel = kernel
        self._effect = effect
        self.compiled = []

    def __getitem__(self, grid):
        def launch(**arguments):
            self.compiled.append(self._kernel.warmup(grid=grid, **arguments))
            self._effect(arguments)

        return launch


def compile_group(profile, spec):
    """What is compiled for the layers of a group, kernel by kernel."""
    values = hard_values(profile, spec, 1, spec.layers)
    buffers = [torch.empty((spec.page_tokens, *values.shape[3:]), dtype=values.dtype) for _ in range(spec.layers)]
    packed = get_transform(profile, spec).pack(values)
    names = [f"_restore_{profile}_layer", *(["_write_high_escapes"] if profile == "high" else [])]
    slots = torch.arange(spec.page_tokens)
    return compile_all(restore, names, lambda: open_restore(profile, spec).restore(packed, slots, buffers))


def no_effect(arguments):
    pass


def compile_all(module, names, launch, effects=None):
    """What ``launch`` compiles of the named kernels of a module."""
    kernels = {name: getattr(module, name) for name in names}
    stand_ins = {name: CompileOnly(kernel, (effects or {}).get(name, no_effect)) for name, kernel in kernels.items()}
    for name, stand_in in stand_ins.items():
        setattr(module, name, stand_in)
    launch()
    for name, kernel in kernels.items():
        setattr(module, name, kernel)
    return {name: stand_in.compiled for name, stand_in in stand_ins.items()}


def compile_calibrated(spec, rope, side):
    """What is compiled for all layer groups of a model, one page each, and an escape."""
    calibration = random_calibration(spec, layers_per_block=1, rope=rope)
    transform = KltTransform(spec, calibration, "high")
    kernel = klt.KltRestore(spec, calibration, "high", "cpu")
    slots = torch.arange(spec.page_tokens)

    def launch():
        for group in layer_groups(spec):
            values = torch.randn((1, group.layers, spec.page_tokens, spec.kv_heads, spec.head_dim))
            values[0, 0, 0, 0, 0] = 400.0
            packed = transform.pack(group, side, values.to(torch_dtype(spec.dtype)), [64])
            assert packed[0].escapes
            buffers = [values[0, 0].to(torch_dtype(spec.dtype)) for _ in range(group.layers)]
            kernel.restore(group, side, packed, [64], slots, buffers)

    return compile_all(klt, ["_read_codes", "_write_escapes", "_read_far_escapes", "_restore_klt_tile"], launch)


PACK_EFFECTS = {
    "_read_values": lambda arguments: arguments["is_bad"].zero_(),
    "_write_codes": lambda arguments: arguments["escapes"].fill_(1),
}
"""Values that can be coded, and escapes to list."""


def compile_klt_pack(spec, rope, side):
    """What is compiled to pack all layer groups of a model, one page each."""
    calibration = random_calibration(spec, layers_per_block=1, rope=rope, gain_components=2)
    kernel = klt_pack.KltPack(spec, calibration, "high", "cpu")

    def launch():
        for group in layer_groups(spec):
            layers = empty_layers(spec, group.layers)
            assert kernel.pack(group, side, [64], torch.arange(spec.page_tokens), layers) is not None

    return compile_all(klt_pack, ["_read_values", "_analyse", "_write_codes", "_list_escapes"], launch, PACK_EFFECTS)


def compile_exact_pack(spec):
    def launch():
        for group in layer_groups(spec):
            layers = empty_layers(spec, group.layers)
            exact_pack.ExactPack(spec).pack(group, Side.KEY, [0], torch.arange(spec.page_tokens), layers)

    return compile_all(exact_pack, ["_pack_exact"], launch)["_pack_exact"]


HIGH_EFFECTS = {
    "_first_steps": lambda arguments: arguments["escaped"].fill_(1),
    "_write_high": lambda arguments: arguments["counts"].zero_(),
}
"""An escape to list in each layer."""
TRIED_TWICE = ("_noise_sums", "_choose_steps")
"""For the first step, and for all the others at once: two kernels under one name."""


def compile_high_pack(spec):
    """What is compiled to pack all layer groups of a model, one page each."""
    kernel = high_pack.HighPack(spec, "cpu")
    names = ["_channel_means", "_signal_sums", "_first_steps", *TRIED_TWICE, "_write_high", "_list_high_escapes"]

    def launch():
        for group in layer_groups(spec):
            layers = empty_layers(spec, group.layers)
            (page,) = kernel.pack(group, Side.KEY, [0], torch.arange(spec.page_tokens), layers)
            assert page.escapes

    compiled = compile_all(high_pack, names, launch, HIGH_EFFECTS)
    for name in TRIED_TWICE:
        both = compiled.pop(name)
        compiled |= {f"{name} of the first": both[::2], f"{name} of the others": both[1::2]}
    return compiled


def empty_layers(spec, count):
    shape = (spec.page_tokens, spec.kv_heads, spec.head_dim)
    return [torch.zeros(shape).to(torch_dtype(spec.dtype)) for _ in range(count)]


def compile_digest():
    planes = planes_of(torch.zeros((2, 288, 192), dtype=torch.uint8))
    return compile_all(digest, ["_add_digest"], lambda: digest.plane_digests(planes, 192, 192))


def check(compiled, capability):
    # One kernel for all layers and pages: nothing is compiled while a request waits.
    assert len({each.hash for each in compiled}) == 1, compiled[0].metadata.name
    assert compiled[0].asm["cubin"].startswith(b"\x7fELF")
    ptx = compiled[0].asm["ptx"]
    assert f".target sm_{capability}" in ptx
    # Subnormals count: neither steps nor values may be flushed to zero.
    assert ".ftz" not in ptx


def main(capability):
    driver.set_active(AbsentGPU(capability))
    for profile, dtype in CASES:
        for shape in ((3, 8, 128, 64), (2, 3, 21, 17)):
            kernels = compile_group(profile, KVSpec(*shape, dtype))
            assert len(kernels[f"_restore_{profile}_layer"]) == shape[0]
            for name, compiled in kernels.items():
                check(compiled, capability)
                print(f"compiled {name} {dtype.torch_name} {shape} for sm_{capability}")
    for dtype, shape in HIGH_PACKED:
        for name, compiled in compile_high_pack(KVSpec(*shape, dtype)).items():
            check(compiled, capability)
            print(f"compiled {name} {dtype.torch_name} {shape} for sm_{capability}")
    for dtype, shape, rope, side in CALIBRATED:
        for name, compiled in compile_calibrated(KVSpec(*shape, dtype), rope, side).items():
            check(compiled, capability)
            print(f"compiled {name} {dtype.torch_name} {shape} {side.value} for sm_{capability}")
        for name, compiled in compile_klt_pack(KVSpec(*shape, dtype), rope, side).items():
            check(compiled, capability)
            print(f"compiled {name} {dtype.torch_name} {shape} {side.value} for sm_{capability}")
        check(compile_exact_pack(KVSpec(*shape, dtype)), capability)
        print(f"compiled _pack_exact {dtype.torch_name} {shape} for sm_{capability}")
    check(compile_digest()["_add_digest"], capability)
    print(f"compiled digest for sm_{capability}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
