"""The Hadamard transform of heads that a program holds in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _signs(BITS: tl.constexpr):
    """The Hadamard matrix of signs: -1 where row and column share an odd number of bits."""
    number = tl.arange(0, 1 << BITS)
    shared = number[:, None] & number[None, :]
    for bit in tl.static_range(1, BITS):
        shared ^= (number[:, None] & number[None, :]) >> bit
    return (1 - 2 * (shared & 1)).to(tl.float32)


@triton.jit
def turn(value, BITS: tl.constexpr):
    """The heads `[n, 2**BITS]` times the Hadamard matrix of signs, `2**(BITS / 2)` times too large.

    A round adds and subtracts channels that differ in the last bit of their number, and moves that
    bit to the front: after `BITS` rounds all are in order again. The first ones, on what a thread
    holds, are sums and differences; four at once are a product by the matrix of 16 signs, in TF32,
    whose 2**-11 of a value is far below a step of 8 bits.
    """
    heads: tl.constexpr = value.shape[0]
    channels: tl.constexpr = value.shape[1]
    is_product: tl.constexpr = BITS >= 4 and heads * channels >= 256
    for _ in tl.static_range(BITS - 4 if is_product else BITS):
        even, odd = tl.split(value.reshape(heads, channels // 2, 2))
        value = tl.join(even + odd, even - odd).permute(0, 2, 1).reshape(heads, channels)
    if is_product:
        rows = value.reshape(heads * channels // 16, 16)
        sums = tl.dot(rows, _signs(4), input_precision="tf32").reshape(heads, channels // 16, 16)
        value = sums.permute(0, 2, 1).reshape(heads, channels)
    return value
