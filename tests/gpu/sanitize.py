"""Runs every kernel once on few odd shapes, for compute-sanitizer to watch.

    make sanitize

Without the cache of torch each tensor is an allocation of its own, so that what is read or written
beyond one is noticed. The numbers are compared by the tests beside this file; under the sanitizer
everything is a hundred times slower, so here each kernel runs on what reaches its edges: one row,
and a few more than a tile.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import test_fused_gpu as fused
import test_kernels_gpu as plain
import test_linear_residual_gpu as residual
import test_low_rank_gpu as low_rank
import test_static_gpu as static
import torch
from torch._ops import OpOverload

from wancompile.kernels import KERNELS
from wancompile.quant.gptq import Feedback, round_weight
from wancompile.quant.numerics import FP8, INT8, absmax_scale

LINEAR_RESIDUAL = torch.ops.wancompile.scaled_linear_residual.default
TOKENS = (1, 130)
Case = tuple[OpOverload, tuple]


def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    never = {kernel.name for kernel in KERNELS}
    for op, args in cases(device):
        for kernel in KERNELS:
            if kernel.op == op and kernel.supports(device, args) is None:
                kernel.impl(*args)
                torch.cuda.synchronize()
                never.discard(kernel.name)
    round_weights(device)
    print(f"ran {len(KERNELS) - len(never)} kernels")
    print(f"did not fit: {', '.join(sorted(never)) or 'none'}")
    if len(never) == len(KERNELS):
        sys.exit("no kernel runs on this device")


def round_weights(device: torch.device) -> None:
    """GPTQ, whose kernel belongs to no op."""
    for dtype in (INT8, FP8):
        for rows, channels in ((1, 1), (130, 200)):
            weight, x = torch.randn(rows, channels, device=device), torch.randn(64, channels)
            scale = absmax_scale(weight, -1, dtype)
            round_weight(weight, scale, dtype, Feedback.of(x.to(device)))
    torch.cuda.synchronize()


def cases(device: torch.device) -> Iterator[Case]:
    """Arguments for every op that has kernels."""
    for tokens in TOKENS:
        yield from linears(tokens, device)
        yield from attentions(tokens, device)
        yield from rows(tokens, device)


def linears(tokens: int, device: torch.device) -> Iterator[Case]:
    for dtype in (INT8, FP8):
        args = plain.linear_args((tokens, 1552, 208), dtype, device)
        yield plain.LINEAR, (*args, torch.bfloat16)
        yield LINEAR_RESIDUAL, residual.residual_args((2, tokens, 1552, 208), dtype, device)
        yield static.LINEAR_GELU, static.gelu_args((tokens, 1552, 208), dtype, device)
        shape = (tokens, 1552, 208, 48)
        *linear, low, up = low_rank.low_rank_args(shape, dtype, torch.bfloat16, device)
        yield low_rank.LINEAR_LOW_RANK, (*linear, low, up, torch.bfloat16)
        down = torch.randn(48, 1552, device=device, dtype=torch.bfloat16)
        yield low_rank.LOW_RANK_DOWN, (*linear[:2], down)


def attentions(tokens: int, device: torch.device) -> Iterator[Case]:
    for dtype in (INT8, FP8):
        for per_token in (False, True):
            q, k, v, *scales, v_scale, factor, to = plain.attention_args(
                dtype, 2, (tokens, tokens + 3), 128, device, per_token=per_token
            )
            yield plain.ATTENTION, (q, k, v, *scales, v_scale, factor, to)
            yield plain.ATTENTION, (q, k, v.to(to), *scales, None, factor, to)
    heads = torch.randn(3, 1, tokens, 4, 128, device=device, dtype=torch.bfloat16).transpose(2, 3)
    yield fused.SDPA, (*heads, None, 0.0, False, None, False)


def rows(tokens: int, device: torch.device) -> Iterator[Case]:
    shape = 1, tokens, 512
    x = fused.stream(*shape, device=device)
    ones = torch.ones(512, device=device)
    angles = torch.rand(tokens, 64, device=device)
    yield fused.RMS_NORM, (x, [512], ones.to(x.dtype), fused.EPS)
    yield fused.FLOAT_ROTATE, (x, None, fused.EPS, angles, angles, x.dtype)
    for kind in fused.KINDS:
        gate, gate_offset, *modulated, at = fused.modulation(kind, shape, x.dtype, device)
        yield fused.NORM, (x, *modulated, at, fused.EPS, ones, INT8)
        both = gate, gate_offset, *modulated, at
        yield fused.RESIDUAL_NORM, (x, x, *both, fused.EPS, None, FP8)
        yield fused.ADD_GATED, (x, x, gate, gate_offset, at)
    for dtype in (INT8, FP8):
        yield plain.PER_TOKEN, (x, ones, dtype)
        yield static.PER_TENSOR, (x, ones, ones[:1], dtype)
        yield plain.PER_HEAD, (x.view(1, tokens, 4, 128).transpose(1, 2), ones[:4], dtype)
        yield fused.GELU, (x, "tanh", ones, dtype)
        rotated = x, None, fused.EPS, angles, angles
        yield fused.ROTATE, (*rotated, None, ones[:4], True, dtype)
        yield fused.ROTATE_PER_TOKEN, (*rotated, True, dtype)


if __name__ == "__main__":
    main()
