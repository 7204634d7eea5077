"""The Hadamard transform of the channels of a head, which spreads a large channel over all."""

import math

import torch
from torch import Tensor

from wancompile.ops.check import require


@torch.library.custom_op("wancompile::hadamard", mutates_args=())
def hadamard(x: Tensor) -> Tensor:
    """Multiply the last dim by the orthonormal Hadamard matrix H (Sylvester 1867).

    H is symmetric and its own inverse, so (q H) (k H)^T = q k^T (Ashkboos et al. 2024, "QuaRot").

    Args:
        x: `[..., D]`, any float dtype, D a power of two.

    Returns:
        `x @ H` of the shape and dtype of `x`, contiguous; computed in fp32, of float64 in that.
    """
    check_hadamard(x)
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    return turned(wide).to(x.dtype).contiguous()


@hadamard.register_fake
def fake_hadamard(x: Tensor) -> Tensor:
    """Shape and dtype of `hadamard`."""
    check_hadamard(x)
    return x.new_empty(x.shape)


def has_hadamard(size: object) -> bool:
    """Whether there is a Hadamard matrix here for heads of so many channels: a power of two."""
    return isinstance(size, int) and size > 0 and size & (size - 1) == 0


def turned(x: Tensor) -> Tensor:
    """`x [..., D] @ H` in the dtype of `x`, fp32 or float64: log2(D) times sums and differences.

    No product, which could be in TF32 on a GPU.
    """
    size = x.shape[-1]
    for _ in range(size.bit_length() - 1):
        even, odd = x[..., ::2], x[..., 1::2]
        x = torch.cat([even + odd, even - odd], -1)
    return x / math.sqrt(size)


def check_hadamard(x: Tensor) -> None:
    """Raise InputError unless the argument is that of `hadamard`."""
    fits = x.dim() > 0 and x.is_floating_point() and x.dtype.itemsize > 1
    fits = fits and has_hadamard(int(x.shape[-1]))
    require(fits, "hadamard", "x float[..., D] of 16 bits or more, D a power of two", x)
