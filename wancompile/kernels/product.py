"""What all wrappers of 8-bit products do around their launch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wancompile.kernels.base import aligned
from wancompile.ops.linear import row_scales


def product(
    launch: Callable[..., None],
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    **epilogue: Any,
) -> Tensor:
    """Return `[..., N]` in `out_dtype` as `launch` fills it; operands as of `scaled_linear`.

    Operands begin where bulk copies may, and `epilogue` goes to `launch` as it is. Of no rows or
    columns nothing is launched.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty((rows.shape[0], weight.shape[0]), dtype=out_dtype)
    if out.numel():
        launch(
            aligned(rows),
            row_scales(x_scale),
            aligned(weight),
            weight_scale.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            **epilogue,
        )
    return out.view(*x.shape[:-1], weight.shape[0])
