"""Check the variants of the Hopper matrix product, then time them beside their rivals.

    python -m benchmarks.linear_variants
    python -m benchmarks.linear_variants --residual

Every check runs in a process of its own that is stopped after 40 s, for a kernel whose barriers
are wrong hangs. What passes is timed at 480p, 32,760 tokens; the tables come last. The whole takes
at most 150 s on an H100 with 16 cores. With `--residual` there is only the last table: products
that add the residual stream themselves, beside those that leave it to another kernel.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import torch
import triton
from torch import Tensor

from benchmarks.kernels import DEVICE, activations, relative, rival_linear
from wancompile.kernels.jit import linear, linear_hopper
from wancompile.kernels.triton_norm import add_gated_triton
from wancompile.kernels.triton_quantize import quantize_per_token_triton
from wancompile.ops.linear import epilogue
from wancompile.quant.numerics import FP8, INT8

MODULE = "benchmarks.linear_variants"
TYPES = {"int8": INT8, "fp8": FP8}
VARIANTS = {
    "s4 b2": linear_hopper.Tile(),
    "s4 b2 g16": linear_hopper.Tile(group=16),
    "s3 b4": linear_hopper.Tile(stages=3, buffers=4),
}
ODD = (1552, 5120)  # K no multiple of a step
TIMED = [(5120, 13824), (13824, 5120), (5120, 5120), (5120, 15360), (1536, 8960)]  # K, N
WITH_RESIDUAL = [(5120, 5120), (13824, 5120)]  # K, N
TOKENS = 32_760
ROWS = (1, 127, 333, TOKENS)
CHUNK = 4096
FP8_TOLERANCE = 2e-3  # what rounding to bf16 gives
CHECK_LIMIT_S, CHECKS_UNTIL_S, TIMES_UNTIL_S = 40, 95, 145
PROCESSES = 16
Case = tuple[str, str, int, int]  # variant, type, K, N
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # as `launch` takes them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", type=json.loads)
    parser.add_argument("--time", type=json.loads)
    parser.add_argument("--residual", action="store_true")
    given = parser.parse_args()
    if given.check is not None:
        check(*given.check)
    elif given.time is not None:
        time_all({tuple(case) for case in given.time})
    elif given.residual:
        time_residuals()
    else:
        check_then_time()


def check_then_time() -> None:
    started = time.monotonic()
    ways = list(itertools.product(VARIANTS, TYPES))
    alive = run_checks([(*way, *ODD) for way in ways], started)
    ways = [way for way in ways if (*way, *ODD) in alive]
    good = run_checks([(*way, *shape) for shape in TIMED for way in ways], started)
    for arguments in (["--time", json.dumps(sorted(good))], ["--residual"]):
        left = TIMES_UNTIL_S - (time.monotonic() - started)
        command = [sys.executable, "-m", MODULE, *arguments]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(command, timeout=left, check=False)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton "
          f"{triton.__version__}, {time.monotonic() - started:.0f} s")  # fmt: skip


def run_checks(cases: list[Case], started: float) -> set[Case]:
    """The cases that are right; the others are printed with what went wrong."""

    def run(case: Case) -> str:
        left = CHECKS_UNTIL_S - (time.monotonic() - started)
        if left < 5:
            return "no time left"
        return run_apart(["--check", json.dumps(case)], min(left, CHECK_LIMIT_S))

    with ThreadPoolExecutor(PROCESSES) as pool:
        answers = dict(zip(cases, pool.map(run, cases), strict=True))
    for case, answer in answers.items():
        print(f"{case!s:48}{answer}", flush=True)
    return {case for case, answer in answers.items() if answer.startswith("right")}


def run_apart(arguments: list[str], limit_s: float) -> str:
    """What this module prints with `arguments`, or the last line of its failure."""
    command = [sys.executable, "-m", MODULE, *arguments]
    try:
        done = subprocess.run(command, timeout=limit_s, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    if done.returncode:
        errors = done.stderr.strip().splitlines() or [""]
        return f"exit code {done.returncode}: {errors[-1][:200]}"
    return done.stdout.strip()


def check(variant: str, type_name: str, depth: int, columns: int) -> None:
    """Raise AssertionError unless all counts of rows are right, and nothing else is written."""
    q, scale, weight, weight_scale, bias = operands(TYPES[type_name], depth, columns)
    is_int8 = type_name == "int8"
    compare, most = (differs_from_int_mm, 0.0) if is_int8 else (differs_from_float64, FP8_TOLERANCE)
    biases = (bias, None) if (depth, columns) == ODD else (bias,)
    for rows, some_bias in itertools.product(ROWS, biases):
        memory = torch.full((rows + 64, columns), torch.nan, device=DEVICE, dtype=torch.bfloat16)
        out, beyond = memory[:rows], memory[rows:]
        sides = q[:rows], scale[:rows], weight, weight_scale, some_bias
        linear_hopper.launch(*sides, out, VARIANTS[variant])
        error = compare(out, *sides)
        assert error <= most, f"{rows} rows: error {error:.1e}"
        assert beyond.isnan().all(), f"{rows} rows: written beyond the end"
    print(f"right, error {error:.1e}")


def operands(dtype: torch.dtype, depth: int, columns: int) -> Operands:
    torch.manual_seed(0)
    q, scale = quantize_per_token_triton(activations(TOKENS, depth), None, dtype)
    weight = torch.randn(columns, depth, device=DEVICE, dtype=torch.bfloat16)
    w8, weight_scale = quantize_per_token_triton(weight, None, dtype)
    bias = torch.randn(columns, device=DEVICE, dtype=torch.bfloat16)
    return q, scale, w8, weight_scale, bias


def differs_from_int_mm(
    out: Tensor, q: Tensor, scale: Tensor, w8: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> float:
    """The share of elements of `out` that are not, bit for bit, the plain body's."""
    wrong = 0
    for start in range(0, len(q), CHUNK):
        rows = slice(start, start + CHUNK)
        padded = torch.cat([q[rows], q.new_zeros(32, q.shape[1])])  # _int_mm refuses few rows
        product = torch._int_mm(padded, w8.t())[: len(q[rows])]
        plain = epilogue(product, scale[rows], weight_scale, bias, out.dtype)
        wrong += int((out[rows].view(torch.int16) != plain.view(torch.int16)).sum())
    return wrong / out.numel()


def differs_from_float64(
    out: Tensor, q: Tensor, scale: Tensor, w8: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> float:
    """The relative error of all rows to the Triton kernel, or of sampled ones to float64.

    The latter grows with K, for the tensor cores keep fewer bits of a running sum than fp32 has.
    """
    sample = torch.linspace(0, len(q) - 1, 48, device=DEVICE).long().unique()
    exact = (q[sample].double() * scale[sample].double()) @ w8.t().double()
    exact *= weight_scale.t().double()
    if bias is not None:
        exact += bias.double()
    triton_out = torch.empty_like(out)
    linear.launch(q, scale, w8, weight_scale, bias, triton_out)
    pairs = zip(out.split(CHUNK), triton_out.split(CHUNK), strict=True)
    sampled = relative(out[sample], exact) / (1 + q.shape[1] / 512)
    errors = [sampled, *(relative(ours, theirs) for ours, theirs in pairs)]
    return float(torch.tensor(errors).max())  # unlike Python's, it lets no NaN pass


def time_all(good: Iterable[Case]) -> None:
    """Print TFLOP/s of the good cases, of the Triton kernel and of torch's products."""
    names = [*VARIANTS, "triton", "torch"]
    print(f"\n{'TFLOP/s':24}" + "".join(f"{name:>12}" for name in names))
    for (depth, columns), type_name in itertools.product(TIMED, TYPES):
        sides = operands(TYPES[type_name], depth, columns)
        out = torch.empty(TOKENS, columns, device=DEVICE, dtype=torch.bfloat16)
        runs: dict[str, Callable[[], object]] = {
            name: partial(linear_hopper.launch, *sides, out, tile)
            for name, tile in VARIANTS.items()
            if (name, type_name, depth, columns) in good
        }
        runs["triton"] = partial(linear.launch, *sides, out)
        runs["torch"] = rival_linear(*sides[:4])
        work = 2 * TOKENS * depth * columns
        rates = {name: work / ms / 1e9 for name, ms in medians(runs).items()}
        cells = "".join(f"{rates[n]:12.0f}" if n in rates else f"{'-':>12}" for n in names)
        print(f"{f'{depth} -> {columns} {type_name}':24}{cells}", flush=True)


def time_residuals() -> None:
    """Print milliseconds of products alone, with a residual, and followed by the sum."""
    names = ["alone", "alone, s3 b4", "residual", "no gate", "alone, sum"]
    print(f"\n{'ms':24}" + "".join(f"{name:>14}" for name in names))
    for (depth, columns), type_name in itertools.product(WITH_RESIDUAL, TYPES):
        sides = operands(TYPES[type_name], depth, columns)
        residual = activations(TOKENS, columns)
        gate = torch.randn(columns, device=DEVICE)
        out = torch.empty_like(residual)
        alone = partial(linear_hopper.launch, *sides, out)
        fused = partial(alone, residual=residual)
        check_residual(sides, residual, gate)
        runs: dict[str, Callable[[], object]] = {
            "alone": alone,
            "alone, s3 b4": partial(alone, VARIANTS["s3 b4"]),
            "residual": partial(fused, gate=gate),
            "no gate": fused,
            "alone, sum": partial(alone_then_sum, alone, residual, out, gate),
        }
        times = medians(runs)
        cells = "".join(f"{times[name]:14.3f}" for name in names)
        print(f"{f'{depth} -> {columns} {type_name}':24}{cells}", flush=True)


def alone_then_sum(alone: Callable[[], object], x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    alone()
    return add_gated_triton(x[None], y[None], gate, None, None)


def check_residual(sides: Operands, residual: Tensor, gate: Tensor) -> None:
    """Raise AssertionError unless the fused sum is, bit for bit, that of an fp32 product."""
    out, product = torch.empty_like(residual), torch.empty_like(residual, dtype=torch.float32)
    linear_hopper.launch(*sides, product)
    linear_hopper.launch(*sides, out, residual=residual, gate=gate)
    apart = residual.float() + product * gate
    assert torch.equal(out, apart.to(out.dtype)), "the product with a residual is wrong"


def medians(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Milliseconds; all take turns, so that none has the cool chip for itself."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3):
        for name, run in runs.items():
            times[name] += triton.testing.do_bench(run, warmup=15, rep=60, return_mode="all")
    return {name: statistics.median(found) for name, found in times.items()}


if __name__ == "__main__":
    main()
