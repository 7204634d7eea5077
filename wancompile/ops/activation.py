"""GELU and the rounding to 8 bits, as one op."""

import torch
import torch.nn.functional as F
from torch import Tensor

from wancompile.errors import InputError
from wancompile.ops.quantize import check_per_token, quantize_per_token

APPROXIMATIONS = ("none", "tanh")


@torch.library.custom_op("wancompile::gelu_quantize", mutates_args=())
def gelu_quantize(
    x: Tensor, approximate: str, inv_smooth: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """GELU in fp32 (Hendrycks & Gimpel 2016), then `quantize_per_token`.

    Args:
        x: `[..., K]`, any float dtype.
        approximate: "none" for `x * Phi(x)`, "tanh" for the approximation of Phi by a tanh.
        inv_smooth: `[K]` fp32 or None, see `quantize_per_token`.
        dtype: int8 or e4m3.

    Returns:
        `q [..., K]` in `dtype` and `scale [..., 1]` fp32.
    """
    check_gelu(x, approximate, inv_smooth, dtype)
    y = F.gelu(x.to(torch.float32), approximate=approximate)
    q, scale = quantize_per_token(y, inv_smooth, dtype)
    return q, scale


@gelu_quantize.register_fake
def fake_gelu_quantize(
    x: Tensor, approximate: str, inv_smooth: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of `gelu_quantize` and of its kernels."""
    check_gelu(x, approximate, inv_smooth, dtype)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), scale


def check_gelu(x: Tensor, approximate: str, inv_smooth: Tensor | None, dtype: torch.dtype) -> None:
    """Raise InputError unless the arguments are those of `gelu_quantize`."""
    if approximate not in APPROXIMATIONS:
        raise InputError(f"gelu_quantize knows {APPROXIMATIONS}, not {approximate!r}")
    check_per_token(x, inv_smooth, dtype)
