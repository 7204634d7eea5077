"""`gelu_quantize` in one pass over memory."""

import torch
from torch import Tensor

from wancompile.kernels.base import Kernel
from wancompile.kernels.triton_quantize import as_rows, lacks_row, lacks_type
from wancompile.ops.activation import check_gelu, fake_gelu_quantize


@torch.library.custom_op("wancompile_kernels::gelu_quantize_triton", mutates_args=())
def gelu_quantize_triton(
    x: Tensor, approximate: str, inv_smooth: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`gelu_quantize`; each row is read once and stays in registers."""
    check_gelu(x, approximate, inv_smooth, dtype)
    q = x.new_empty(x.shape, dtype=dtype)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if q.numel():
        from wancompile.kernels.jit import activation

        smooth = None if inv_smooth is None else inv_smooth.contiguous()
        activation.launch_gelu_quantize(as_rows(x), approximate, smooth, q, scale)
    return q, scale


gelu_quantize_triton.register_fake(fake_gelu_quantize)


def _supports(device: torch.device, args: tuple[object, ...]) -> str | None:
    return lacks_type(device, args[3]) or lacks_row(args[0])


GELU_QUANTIZE_TRITON = Kernel(
    "gelu_quantize_triton",
    torch.ops.wancompile.gelu_quantize.default,
    torch.ops.wancompile_kernels.gelu_quantize_triton.default,
    _supports,
)
