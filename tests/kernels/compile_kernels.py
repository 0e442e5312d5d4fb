"""Compiles the restore kernels, as they are launched, for GPUs that need not be there; prints a line for each."""

import torch
import triton
from kernel_kit import hard_values
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sglang_kvcodec.format.spec import KVDtype, KVSpec
from sglang_kvcodec.kernels import open_restore, restore
from sglang_kvcodec.transform import get_transform

TARGETS = [GPUTarget("cuda", capability, 32) for capability in (80, 90)]
POINTERS = {torch.uint8: "*u8", torch.int16: "*i16", torch.int64: "*i64", torch.float32: "*fp32"}


class Recorder:
    """In the place of a kernel: keeps the arguments it is launched with."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append(arguments)


def source_of(kernel, arguments):
    """The kernel as it is compiled for such arguments: all that may be taken for a multiple of 16 is."""
    constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            continue
        signature[parameter.name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or (value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def main():
    cases = [("high", KVDtype.BFLOAT16), ("high", KVDtype.FLOAT16), *(("exact", dtype) for dtype in KVDtype)]
    for profile, dtype in cases:
        for shape in ((3, 8, 128, 64), (2, 3, 21, 17)):
            spec = KVSpec(*shape, dtype)
            name = f"_restore_{profile}_layer"
            kernel, recorder = getattr(restore, name), Recorder()
            setattr(restore, name, recorder)
            values = hard_values(profile, spec, 1, spec.layers)
            buffers = [values.new_empty((spec.page_tokens, spec.kv_heads, spec.head_dim))] * spec.layers
            packed = get_transform(profile, spec).pack(values)
            open_restore(profile, spec).restore(packed, torch.arange(spec.page_tokens), buffers)
            setattr(restore, name, kernel)
            source = source_of(kernel, recorder.launches[0])
            for target in TARGETS:
                compiled = triton.compile(source, target=target)
                assert compiled.asm["cubin"].startswith(b"\x7fELF")
                assert f".target sm_{target.arch}" in compiled.asm["ptx"]
                # Subnormals count: neither steps nor values may be flushed to zero.
                assert ".ftz" not in compiled.asm["ptx"]
                print(f"compiled {profile} {dtype.torch_name} {shape} for sm_{target.arch}")


if __name__ == "__main__":
    main()
