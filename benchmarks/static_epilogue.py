"""What it saves that a product rounds what comes behind its GELU, by a static scale.

    python -m benchmarks.static_epilogue

Times the two kernels that a scale per token needs, the linear and GELU with rounding, over the one
that a static scale needs, at the sizes of Wan's first feed-forward linears. All take turns. Each
result is first compared with the plain body on the last tokens. Takes under a minute on an H100.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from tabulate import tabulate
from torch import Tensor

from benchmarks import record
from benchmarks.timing import DEVICE, TOKENS, activations, label
from wancompile import kernels, ops
from wancompile.quant.numerics import FP8, INT8, QMAX

SIZES = {"14B": (5120, 13824), "1.3B": (1536, 8960)}  # K, N
CASES = [("14B", "480p"), ("14B", "720p"), ("1.3B", "480p")]
LAST = 256  # tokens that are compared with the plain body
FORM = "tanh"
namespace = torch.ops.wancompile


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(argv)
    results = list(measure(options.turns))
    print(record.write(options.out, "static_epilogue", record.settings(options), results))
    print(table(results))


def measure(turns: int) -> Iterator[dict[str, Any]]:
    """Yield what each size and type takes, and how far the result is from the plain body."""
    for (model, length), dtype in ((case, dtype) for case in CASES for dtype in (INT8, FP8)):
        linear, inverse, scale = operands(TOKENS[length], *SIZES[model], dtype)
        fused = *linear, FORM, inverse, scale, dtype
        runs = {
            "linear": chosen(namespace.scaled_linear.default, *linear, torch.bfloat16),
            "linear, gelu": apart(linear, inverse, dtype),
            "one kernel": chosen(namespace.linear_gelu_quantize.default, *fused),
        }
        yield {
            "model": model,
            "length": length,
            "type": label(dtype),
            "differs": differing(runs["one kernel"](), fused),
            **timed(runs, turns),
        }


def operands(
    tokens: int, depth: int, features: int, dtype: torch.dtype
) -> tuple[tuple[Any, ...], Tensor, Tensor]:
    """Return the operands of the linear, 1/s, and the scale that holds the largest value."""
    torch.manual_seed(0)
    per_token = torch.ops.wancompile_kernels.quantize_per_token_triton
    x, x_scale = per_token(activations(tokens, depth), None, dtype)
    weight = torch.randn(features, depth, device=DEVICE, dtype=torch.bfloat16) / depth**0.5
    w8, weight_scale = per_token(weight, None, dtype)
    bias = torch.randn(features, device=DEVICE, dtype=torch.bfloat16)
    linear = x, x_scale, w8, weight_scale, bias
    inverse = torch.rand(features, device=DEVICE) + 0.5
    run = chosen(namespace.scaled_linear.default, *linear, torch.bfloat16)
    top = run().amax().float() * inverse.amax()
    return linear, inverse, (top / QMAX[dtype]).reshape(1)


def chosen(op: Any, *args: Any) -> Callable[[], Any]:
    """Return a call of the kernel that lowering would take."""
    kernel, reasons = kernels.choose(op, torch.device(DEVICE), args)
    if kernel is None:
        raise SystemExit(f"no kernel runs {op}: {reasons}")
    return partial(kernel.impl, *args)


def apart(linear: tuple[Any, ...], inverse: Tensor, dtype: torch.dtype) -> Callable[[], Any]:
    """Return what a scale per token needs: two kernels, a bf16 value between them."""
    first = chosen(namespace.scaled_linear.default, *linear, torch.bfloat16)
    op = namespace.gelu_quantize.default
    kernel, _ = kernels.choose(op, torch.device(DEVICE), (first(), FORM, inverse, dtype))
    assert kernel is not None
    return lambda: kernel.impl(first(), FORM, inverse, dtype)


def differing(out: Tensor, args: tuple[Any, ...]) -> float:
    """Return the share of the last tokens' codes that are not those of the plain body."""
    x, x_scale, *rest = args
    plain = ops.linear_gelu_quantize(x[-LAST:], x_scale[-LAST:], *rest)
    return float((out[-LAST:].view(torch.uint8) != plain.view(torch.uint8)).float().mean())


def timed(runs: dict[str, Callable[[], Any]], turns: int) -> dict[str, Any]:
    """Return the median of each in ms, and the ratio of the last two with its spread over turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            found = triton.testing.do_bench(run, warmup=15, rep=60, return_mode="median")
            times[name].append(found)
    pairs = zip(times["linear, gelu"], times["one kernel"], strict=True)
    ratios = [two / one for two, one in pairs]
    return {
        "ms": {name: statistics.median(each) for name, each in times.items()},
        "ratio": statistics.median(ratios),
        "spread": (max(ratios) - min(ratios)) / statistics.median(ratios),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return a row for each size and type."""
    names = list(results[0]["ms"])
    headers = ["model", "length", "type", *(f"{name}, ms" for name in names), "ratio", "spread",
               "codes that differ"]  # fmt: skip
    rows = [
        [one["model"], one["length"], one["type"], *(f"{one['ms'][name]:.3f}" for name in names),
         f"{one['ratio']:.3f}", f"{100 * one['spread']:.1f} %", f"{100 * one['differs']:.3f} %"]
        for one in results
    ]  # fmt: skip
    return tabulate(rows, headers=headers, disable_numparse=True)


if __name__ == "__main__":
    main()
