"""The observers alone, at the sizes of one block, beside the time that reading x once takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton

from benchmarks.timing import DEVICE, activations, copy_bytes_per_ms
from wancompile import ops
from wancompile.presets import Latent
from wancompile.quant.lines import HALVES, PER_RANGE

_LABELS, _ROWS = 10, 256


def observers(config: Mapping[str, Any], latent: Latent) -> list[dict[str, Any]]:
    """Return ms of an observer of each kind, how many a block has, and reads of x that ms pays."""
    tokens = math.prod(latent) // 4
    heads, size = config["num_attention_heads"], config["attention_head_dim"]
    rate = copy_bytes_per_ms()
    found = []
    for count, name, run, nbytes in (
        (5, "channels of the stream", *_channels(tokens, heads * size)),
        (1, "channels of the MLP", *_channels(tokens, config["ffn_dim"])),
        (1, "heads of v", *_heads(tokens, heads, size, is_turned=False)),
        (2, "heads of q and k, turned", *_heads(tokens, heads, size, is_turned=True)),
    ):
        ms = float(triton.testing.do_bench(run, warmup=10, rep=100, return_mode="median"))
        found.append({"observer": name, "per_block": count, "ms": ms, "reads": ms * rate / nbytes})
    return found


def _channels(tokens: int, width: int) -> tuple[Callable[[], object], int]:
    x = activations(1, tokens, width)
    lines = _LABELS * PER_RANGE
    amax = torch.zeros(lines, width, device=DEVICE)
    count = torch.zeros(lines, dtype=torch.int64, device=DEVICE)
    sample = torch.zeros(_ROWS, width, dtype=x.dtype, device=DEVICE)
    priority = torch.full((_ROWS,), torch.inf, dtype=torch.float64, device=DEVICE)
    line = torch.zeros((), dtype=torch.int64, device=DEVICE)
    return (
        lambda: ops.observe_channels(x, amax, count, sample, priority, line, 7),
        x.nbytes,
    )


def _heads(
    tokens: int, heads: int, size: int, *, is_turned: bool
) -> tuple[Callable[[], object], int]:
    x = activations(1, tokens, heads, size).transpose(1, 2)
    low = torch.full((_LABELS * HALVES, heads, size), torch.inf, device=DEVICE)
    high = -low
    line = torch.zeros((), dtype=torch.int64, device=DEVICE)
    return lambda: ops.observe_heads(x, low, high, line, is_turned), x.nbytes
