"""What the ops ask of their arguments."""

import torch
from torch import Tensor

from wancompile.errors import InputError
from wancompile.quant.numerics import QMAX


def require(fits: bool, op: str, need: str, *got: Tensor | torch.dtype | None) -> None:
    """Raise InputError, with what `op` needs and what it got, unless `fits`."""
    if not fits:
        raise InputError(f"{op} needs {need}, but got {', '.join(map(_describe, got))}")


def is_8bit(dtype: torch.dtype) -> bool:
    """Whether `dtype` is one of the two 8-bit types."""
    return dtype in QMAX


def is_scale(scale: Tensor, *shape: int) -> bool:
    """Whether `scale` is fp32 of exactly this shape."""
    return scale.dtype == torch.float32 and tuple(scale.shape) == shape


def is_input_scale(scale: Tensor, x: Tensor) -> bool:
    """Whether `scale` is fp32 `[..., 1]`, one for each token of `x [..., K]`, or `[1]` for all."""
    return is_scale(scale, 1) or is_scale(scale, *x.shape[:-1], 1)


def _describe(value: Tensor | torch.dtype | None) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return str(value)
