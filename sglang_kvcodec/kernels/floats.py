"""fp32 to the bits of a pool's type and back, the same on every device and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrow_bits(
    value: tl.tensor, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, LARGEST: tl.constexpr
) -> tl.tensor:
    """The bits of ``value``, clamped to +-``LARGEST``, in an IEEE-like type of these fields, as int32.

    By hand, because Triton's interpreter cuts bfloat16 off, and because sm_80 has no e4m3. A normal number is rounded
    in its bits, where a carry runs into the exponent as it should. A subnormal one is added to a number of which its
    last bit is the last bit too, so that the addition rounds it.
    """
    DROPPED: tl.constexpr = 23 - MANTISSA_BITS
    BIAS: tl.constexpr = (1 << (EXPONENT_BITS - 1)) - 1
    value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
    wide = value.to(tl.uint32, bitcast=True)
    sign = (wide >> 31).to(tl.int32)
    magnitude = (wide & 0x7FFFFFFF).to(tl.int32)
    normal = (magnitude + ((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1)) >> DROPPED
    if BIAS == 127:
        bits = normal
    else:
        smallest: tl.constexpr = (127 + 1 - BIAS) << 23
        anchor: tl.constexpr = (127 + 1 - BIAS + DROPPED) << 23
        sum_ = tl.abs(value) + tl.full(value.shape, anchor, tl.int32).to(tl.float32, bitcast=True)
        subnormal = sum_.to(tl.int32, bitcast=True) - anchor
        bits = tl.where(magnitude < smallest, subnormal, normal - ((127 - BIAS) << MANTISSA_BITS))
    return bits | (sign << (EXPONENT_BITS + MANTISSA_BITS))


@triton.jit
def widen_bits(bits: tl.tensor, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr) -> tl.tensor:
    """The value of a finite number of such a type as fp32, exact; of ``bits``, int32, the upper ones are ignored."""
    if EXPONENT_BITS == 8:
        wide = (bits << 16).to(tl.float32, bitcast=True)
    else:
        # Fields of fp16 where they are narrower, with another bias.
        sign = (bits >> (EXPONENT_BITS + MANTISSA_BITS) & 1) << 15
        magnitude = (bits & ((1 << (EXPONENT_BITS + MANTISSA_BITS)) - 1)) << (10 - MANTISSA_BITS)
        scale: tl.constexpr = 1 << (16 - (1 << (EXPONENT_BITS - 1)))
        wide = (sign | magnitude).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * scale
    return wide


@triton.jit
def is_finite_bits(bits: tl.tensor, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr) -> tl.tensor:
    """Whether ``bits`` are a number. The e4m3 of pools has no infinities; all ones are none."""
    ones: tl.constexpr = ((1 << EXPONENT_BITS) - 1) << MANTISSA_BITS
    special: tl.constexpr = 0x7F if EXPONENT_BITS == 4 else ones
    return (bits & special) != special
