"""Compiles the restore kernels as their launches would, for GPUs that need not be there; prints a line for each."""

import torch
from kernel_kit import hard_values
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sglang_kvcodec.format.spec import KVDtype, KVSpec
from sglang_kvcodec.kernels import open_restore, restore
from sglang_kvcodec.transform import get_transform

CASES = [("high", KVDtype.BFLOAT16), ("high", KVDtype.FLOAT16), *(("exact", dtype) for dtype in KVDtype)]


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
    """In the place of a kernel: compiles for the arguments it is launched with."""

    def __init__(self, kernel):
        self._kernel = kernel
        self.compiled = []

    def __getitem__(self, grid):
        return lambda **arguments: self.compiled.append(self._kernel.warmup(grid=grid, **arguments))


def compile_group(profile, spec):
    """What is compiled for the layers of a group."""
    name = f"_restore_{profile}_layer"
    kernel = getattr(restore, name)
    compiling = CompileOnly(kernel)
    values = hard_values(profile, spec, 1, spec.layers)
    buffers = [torch.empty((spec.page_tokens, *values.shape[3:]), dtype=values.dtype) for _ in range(spec.layers)]
    packed = get_transform(profile, spec).pack(values)
    setattr(restore, name, compiling)
    open_restore(profile, spec).restore(packed, torch.arange(spec.page_tokens), buffers)
    setattr(restore, name, kernel)
    return compiling.compiled


def main():
    for capability in (80, 90):
        driver.set_active(AbsentGPU(capability))
        for profile, dtype in CASES:
            for shape in ((3, 8, 128, 64), (2, 3, 21, 17)):
                compiled = compile_group(profile, KVSpec(*shape, dtype))
                assert len(compiled) == shape[0]
                # One kernel for all layers: nothing is compiled while a request waits.
                assert len({each.hash for each in compiled}) == 1
                assert compiled[0].asm["cubin"].startswith(b"\x7fELF")
                ptx = compiled[0].asm["ptx"]
                assert f".target sm_{capability}" in ptx
                # Subnormals count: neither steps nor values may be flushed to zero.
                assert ".ftz" not in ptx
                print(f"compiled {profile} {dtype.torch_name} {shape} for sm_{capability}")


if __name__ == "__main__":
    main()
