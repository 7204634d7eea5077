"""GPU implementations of the semantic ops, and which of them takes the place of a node.

To add a kernel: write it as a torch.library op in namespace `wancompile_kernels` with the arguments
and the fake of the op it implements, in a file of its own here; describe it by a `Kernel`; put that
into `KERNELS` before those it beats; add it to the comparisons in tests/interpreted/ (if it is
written in Triton, its `@triton.jit` code belongs in jit/), in tests/gpu/test_kernels_gpu.py, and to
the timings of benchmarks/kernels.py.
"""

import torch
from torch._ops import OpOverload

from wancompile.kernels.base import Kernel
from wancompile.kernels.fa3_attention import ATTENTION_FA3
from wancompile.kernels.hopper_attention import ATTENTION_HOPPER
from wancompile.kernels.hopper_linear import LINEAR_HOPPER, LINEAR_RESIDUAL_HOPPER
from wancompile.kernels.hopper_linear_gelu import LINEAR_GELU_QUANTIZE_HOPPER
from wancompile.kernels.torch_attention import ATTENTION_CUDNN, ATTENTION_DEQUANTIZE_SDPA
from wancompile.kernels.torch_linear import FP8_LINEAR_SCALED_MM, INT8_LINEAR_INT_MM
from wancompile.kernels.triton_activation import GELU_QUANTIZE_TRITON
from wancompile.kernels.triton_attention import ATTENTION_TRITON
from wancompile.kernels.triton_linear import LINEAR_TRITON
from wancompile.kernels.triton_linear_gelu import LINEAR_GELU_QUANTIZE_TRITON
from wancompile.kernels.triton_low_rank import LINEAR_LOW_RANK_TRITON, LOW_RANK_DOWN_TRITON
from wancompile.kernels.triton_norm import (
    ADD_GATED_TRITON,
    NORM_QUANTIZE_TRITON,
    RESIDUAL_NORM_QUANTIZE_TRITON,
    RMS_NORM_TRITON,
)
from wancompile.kernels.triton_quantize import (
    QUANTIZE_PER_HEAD_TRITON,
    QUANTIZE_PER_TENSOR_TRITON,
    QUANTIZE_PER_TOKEN_TRITON,
)
from wancompile.kernels.triton_rotary import (
    NORM_ROTATE_QUANTIZE_PER_TOKEN_TRITON,
    NORM_ROTATE_QUANTIZE_TRITON,
    NORM_ROTATE_TRITON,
)

KERNELS: tuple[Kernel, ...] = (
    LINEAR_HOPPER,
    LINEAR_TRITON,
    FP8_LINEAR_SCALED_MM,
    INT8_LINEAR_INT_MM,
    LINEAR_RESIDUAL_HOPPER,
    LINEAR_GELU_QUANTIZE_HOPPER,
    LINEAR_GELU_QUANTIZE_TRITON,
    LINEAR_LOW_RANK_TRITON,
    LOW_RANK_DOWN_TRITON,
    QUANTIZE_PER_TOKEN_TRITON,
    QUANTIZE_PER_HEAD_TRITON,
    QUANTIZE_PER_TENSOR_TRITON,
    GELU_QUANTIZE_TRITON,
    NORM_ROTATE_TRITON,
    NORM_ROTATE_QUANTIZE_TRITON,
    NORM_ROTATE_QUANTIZE_PER_TOKEN_TRITON,
    NORM_QUANTIZE_TRITON,
    RESIDUAL_NORM_QUANTIZE_TRITON,
    ADD_GATED_TRITON,
    RMS_NORM_TRITON,
    ATTENTION_FA3,
    ATTENTION_HOPPER,
    ATTENTION_TRITON,
    ATTENTION_DEQUANTIZE_SDPA,
    ATTENTION_CUDNN,
)
"""Every kernel, in order of priority: the first that supports a node gets it."""


def choose(
    op: OpOverload, device: torch.device, args: tuple[object, ...]
) -> tuple[Kernel | None, list[tuple[str, str]]]:
    """The kernel for one node, and why those of higher priority refused.

    Args:
        op: the semantic op of the node.
        device: where the program will run.
        args: the node's arguments, fake tensors in place of nodes.

    Returns:
        The first kernel that fits, or None to keep the op's plain body, and (kernel name, reason)
        for each kernel of that op that was asked before and refused.
    """
    refusals: list[tuple[str, str]] = []
    for kernel in KERNELS:
        if kernel.op != op:
            continue
        reason = kernel.supports(device, args)
        if reason is None:
            return kernel, refusals
        refusals.append((kernel.name, reason))
    return None, refusals


__all__ = ["KERNELS", "Kernel", "choose"]
