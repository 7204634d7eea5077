"""The semantic ops: what a quantized program computes, in namespace `wancompile`.

Importing this package defines them. The body of each is plain PyTorch and is three things at once:
the meaning of the op, its implementation wherever no kernel fits, and the oracle of the kernels'
tests. How a result lies in memory does not depend on the strides of the inputs.
"""

from wancompile.ops.activation import gelu_quantize
from wancompile.ops.attention import scaled_attention
from wancompile.ops.hadamard import hadamard
from wancompile.ops.linear import scaled_linear, scaled_linear_residual
from wancompile.ops.linear_gelu import linear_gelu_quantize
from wancompile.ops.low_rank import low_rank_down, scaled_linear_low_rank
from wancompile.ops.norm import add_gated, norm_quantize, residual_norm_quantize
from wancompile.ops.observe import observe_channels, observe_heads
from wancompile.ops.quantize import (
    quantize_per_head,
    quantize_per_tensor,
    quantize_per_token,
)
from wancompile.ops.rotary import (
    norm_rotate,
    norm_rotate_quantize,
    norm_rotate_quantize_per_token,
)
from wancompile.ops.rows import repeated_rows

__all__ = [
    "add_gated",
    "gelu_quantize",
    "hadamard",
    "linear_gelu_quantize",
    "low_rank_down",
    "norm_quantize",
    "norm_rotate",
    "norm_rotate_quantize",
    "norm_rotate_quantize_per_token",
    "observe_channels",
    "observe_heads",
    "quantize_per_head",
    "quantize_per_tensor",
    "quantize_per_token",
    "repeated_rows",
    "residual_norm_quantize",
    "scaled_attention",
    "scaled_linear",
    "scaled_linear_low_rank",
    "scaled_linear_residual",
]
