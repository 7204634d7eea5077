"""What the parts of `benchmarks.kernels` share: a row of the table, and how it is measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from wancompile.quant.numerics import INT8, QMAX

TOKENS = {"480p": 21 * 30 * 52, "720p": 21 * 45 * 80}
HEADS, HEAD_SIZE = 40, 128
DEVICE = "cuda"


@dataclass
class Row:
    """One line of the table; `rate` is in TFLOP/s or GB/s, `error` relative to the reference."""

    part: str
    shape: str
    name: str
    ms: float | None = None
    spread: float | None = None
    rate: float | None = None
    floor: float | None = None
    error: float | None = None
    note: str = ""


def measure(row: Row, work: float, run: Callable[[], object], floor_ms: float | None = None) -> Row:
    """Time `run`, which does `work` operations, or with a floor moves `work` bytes.

    A failure is noted, and so is one noted before: then nothing is timed.
    """
    if row.note:
        return row
    try:
        times = triton.testing.do_bench(run, warmup=25, rep=300, return_mode="all")
    except Exception as error:
        row.note = failure_of(error)
        return row
    row.ms = statistics.median(times)
    row.spread = (max(times) - min(times)) / row.ms
    row.rate = work / row.ms / (1e9 if floor_ms is None else 1e6)
    row.floor = None if floor_ms is None else row.ms / floor_ms
    return row


def checked(row: Row, error: Callable[[], float]) -> Row:
    """Fill in the error, or the note that says why there is none."""
    try:
        row.error = error()
    except Exception as failure:
        row.note = failure_of(failure)
    return row


def failure_of(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:150]}"


def relative(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def differing(out: Tensor, reference: Tensor) -> float:
    """The share of elements whose bits differ."""
    bits = (one.cpu().contiguous().view(torch.uint8) for one in (out, reference))
    return float(torch.ne(*bits).double().mean())


def activations(*shape: int) -> Tensor:
    """Normal values with a few large channels."""
    x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    x[..., ::64] *= 20
    return x


def head_scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.abs().amax((0, 2, 3)).float() / QMAX[dtype]


def copy_bytes_per_ms() -> float:
    """Bytes read and written by a copy, per millisecond: the floor of whatever moves memory."""
    source = torch.empty(1 << 29, device=DEVICE, dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.nbytes / ms


def label(dtype: torch.dtype) -> str:
    return "int8" if dtype == INT8 else "fp8"
