"""What each choice in 8-bit self-attention costs, on the trained models, by simulating it.

    python -m benchmarks.attention_accuracy [t2v i2v] [--videos 4] [--budget 120]

Self-attention is computed in plain PyTorch with q, k, the weights P and v rounded as a choice says:
one factor at a time, the others exact, and whole choices with one factor changed. One-step error is
the relative L2 distance of the model's output from that of the float32 model on calls that nothing
was calibrated on, with exact linears and with int8 ones. PSNR is of whole videos, with int8
linears.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import wancompile
from benchmarks import record, subjects
from benchmarks.attention_choices import (
    Choice,
    PlainRanges,
    Ranges,
    Simulated,
    plain_ranges,
    ranges_of,
)
from benchmarks.smoothing import outputs, relative_error
from wancompile import passes, pipeline
from wancompile.demo.quality import psnr
from wancompile.demo.sampler import Request, calls, sample
from wancompile.ir.site import Site
from wancompile.program import Program
from wancompile.quant.stats import Stats
from wancompile.recipe import RECIPES

_ONE = Choice(qk="int8")
_FP8 = Choice(qk="fp8")
_TURNED = replace(_ONE, turn="hadamard")
ONE_FACTOR: Mapping[str, Choice] = {
    "exact": Choice(),
    "QK int8, scales per head": _ONE,
    "QK int8, K less its middle": replace(_ONE, k_centre="middle"),
    "QK int8, K less its mean": replace(_ONE, k_centre="mean", k_scale="token"),
    "QK int8, 1.1 x the ranges": replace(_ONE, clip=1.1),
    "QK int8, 0.9 x the ranges": replace(_ONE, clip=0.9),
    "QK int8, balanced": replace(_ONE, turn="balance"),
    "QK int8, q per token": replace(_ONE, q_scale="token"),
    "QK int8, k per token": replace(_ONE, k_scale="token"),
    "QK int8, q per token, k per block": replace(_ONE, q_scale="token", k_scale="block"),
    "QK int8, both per block": replace(_ONE, q_scale="block", k_scale="block"),
    "QK int8, both per token": replace(_ONE, q_scale="token", k_scale="token"),
    "QK int8, Hadamard": _TURNED,
    "QK int8, Hadamard, q per token": replace(_TURNED, q_scale="token"),
    "QK int8, Hadamard, q per token, K less its middle": replace(
        _TURNED, q_scale="token", k_centre="middle"
    ),
    "QK int8, Hadamard, q per token, k per block": replace(
        _TURNED, q_scale="token", k_scale="block"
    ),
    "QK int8, Hadamard, both per token": replace(_TURNED, q_scale="token", k_scale="token"),
    "QK fp8, scales per head": _FP8,
    "QK fp8, K less its middle": replace(_FP8, k_centre="middle"),
    "QK fp8, both per token": replace(_FP8, q_scale="token", k_scale="token"),
    "QK fp8, Hadamard": replace(_FP8, turn="hadamard"),
    "P bf16": Choice(p="bf16"),
    "P fp8": Choice(p="fp8"),
    "P fp8, divided by its own sum": Choice(p="fp8-same-sum"),
    "P int8": Choice(p="int8"),
    "P int8, dithered": Choice(p="int8-dither"),
    "P uint8": Choice(p="uint8"),
    "P uint8, dithered": Choice(p="uint8-dither"),
    "P uint8, dithered, blocks of 64": Choice(p="uint8-dither", p_block=64),
    "V bf16": Choice(v="bf16"),
    "V fp8": Choice(v="fp8"),
    "V fp8, less its middle": Choice(v="fp8", v_centre="middle"),
    "V fp8, per channel": Choice(v="fp8", v_scale="channel"),
    "V fp8, per channel, less its middle": Choice(v="fp8", v_scale="channel", v_centre="middle"),
    "V int8": Choice(v="int8"),
    "V int8, per channel": Choice(v="int8", v_scale="channel"),
}
_PLAIN = Choice(qk="int8", k_centre="middle", p="fp8", v="fp8")
_BF16_PV = replace(_PLAIN, p="bf16", v="bf16")
_QUERIES = replace(_TURNED, q_scale="token", k_centre="middle")
RECIPES_AS_CHOICES: Mapping[str, Choice] = {
    "int8": replace(_QUERIES, p="bf16", v="bf16"),
    "int8-fast": replace(_QUERIES, p="fp8", v="fp8"),
    "fp8": replace(_TURNED, qk="fp8", k_centre="middle", p="fp8", v="fp8"),
}
"""What `ATTENTIONS` do."""
_FINE_QK = replace(_TURNED, k_centre="middle", q_scale="token", k_scale="block")
_FINE = replace(_FINE_QK, p="uint8-dither", p_block=64, v="int8", v_scale="channel")
WHOLE: Mapping[str, Choice] = {
    **{f"recipe {name}": choice for name, choice in RECIPES_AS_CHOICES.items()},
    "recipe int8, K not centred": replace(RECIPES_AS_CHOICES["int8"], k_centre="none"),
    "int8 QK, fp8 PV": _PLAIN,
    "int8 QK, fp8 PV, but QK exact": replace(_PLAIN, qk="exact"),
    "int8 QK, fp8 PV, but P exact": replace(_PLAIN, p="exact"),
    "int8 QK, fp8 PV, but V exact": replace(_PLAIN, v="exact"),
    "int8 QK, fp8 PV, K not centred": replace(_PLAIN, k_centre="none"),
    "int8 QK, fp8 PV, q per token": replace(_PLAIN, q_scale="token"),
    "fp8 QK, fp8 PV": replace(_PLAIN, qk="fp8"),
    "int8 QK, bf16 PV": _BF16_PV,
    "int8 QK, bf16 PV, Hadamard": replace(_BF16_PV, turn="hadamard"),
    "int8 QK, bf16 PV, Hadamard, q per token": replace(_BF16_PV, turn="hadamard", q_scale="token"),
    "fine int8 QK, bf16 PV": replace(_FINE_QK, p="bf16", v="bf16"),
    "fine int8 QK, fp8 PV": replace(_FINE_QK, p="fp8-same-sum", v="fp8"),
    "fine int8 QK, int8 PV": _FINE,
    "fine int8 QK, int8 PV, not turned": replace(_FINE, turn="none"),
    "fine int8 QK, int8 PV, q per head": replace(_FINE, q_scale="head"),
    "fine int8 QK, int8 PV, k per head": replace(_FINE, k_scale="head"),
    "fine int8 QK, int8 PV, not dithered": replace(_FINE, p="uint8"),
    "fine int8 QK, int8 PV, blocks of 128": replace(_FINE, p_block=128),
    "fine int8 QK, int8 PV, P int8": replace(_FINE, p="int8-dither"),
}
CELLS = {**WHOLE, **ONE_FACTOR}
_NAME = "attention_accuracy"
# The options by which the figures of cells can be compared.
_COMPARED = ("videos", "steps", "every", "calibration_videos")


def measure(name: str, options: argparse.Namespace, budget: record.Budget) -> dict[str, Any]:
    """Return the figures of every cell on one checkpoint; those out of time are named."""
    model = subjects.load(name)
    shown = calls(model, [subjects.calibration(name, options.calibration_videos, options.steps)])
    stats = wancompile.calibrate(model, shown)
    floating = wancompile.trace(model, shown[0])
    plain = plain_ranges(floating, shown)
    programs = {
        "float": (floating, ranges_of(floating, stats, plain)),
        "int8": _int8(floating, stats, plain),
    }
    asked, _ = subjects.held_out(name, options.videos, options.steps)
    held_out = calls(model, [asked])[:: options.every]
    expected = outputs(model, held_out)
    originals = sample(model, asked) if options.sample else None
    found: dict[str, Any] = {"checkpoint": name, "cells": {}, "left_out": []}
    for label in options.cells:
        if not budget.allows():
            found["left_out"].append(label)
            continue
        with budget.spend():
            runs = {
                kind: Simulated(program, ranges, CELLS[label])
                for kind, (program, ranges) in programs.items()
            }
            cell: dict[str, Any] = {
                kind: relative_error(outputs(run, held_out), expected) for kind, run in runs.items()
            }
            if originals is not None:
                cell["psnr"] = _psnr(model, runs["int8"], asked, originals)
        found["cells"][label] = cell
        print(name, label, cell, flush=True)
    return found


def kept(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what `options.out` has, by checkpoint.

    Raises:
        ValueError: it was measured with other settings.
    """
    results: list[dict[str, Any]] = record.kept(options, _NAME, _COMPARED)
    return results


def merged(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the cells of both by checkpoint; a cell of `new` stands for that of `old`."""
    found: dict[str, dict[str, Any]] = {}
    for one in (*old, *new):
        name = one["checkpoint"]
        cells = {**found.get(name, {}).get("cells", {}), **one["cells"]}
        left_out = [label for label in one["left_out"] if label not in cells]
        found[name] = {"checkpoint": name, "cells": cells, "left_out": left_out}
    return list(found.values())


def _int8(
    program: Program, stats: Stats, plain: PlainRanges
) -> tuple[Program, Mapping[Site, Ranges]]:
    """Return the program with smoothed int8 linears, and the ranges of its float attentions."""
    recipe = RECIPES["int8"]
    smoothed = pipeline.run(program, passes.smoothing(recipe, stats))
    quantized = pipeline.run(smoothed, passes.quantization(recipe, stats))
    return quantized, ranges_of(smoothed, stats, plain)


def _psnr(model: Any, run: Simulated, asked: Request, originals: Tensor) -> list[float]:
    with _run_by(model, run):
        return psnr(sample(model, asked), originals).tolist()


@contextmanager
def _run_by(model: Any, run: Callable[..., Any]) -> Iterator[None]:
    """Let calls of `model` be answered by `run`; samplers ask the model for more than calls."""
    model.__dict__["forward"] = run
    try:
        yield
    finally:
        del model.__dict__["forward"]


def table(found: Mapping[str, Any]) -> str:
    """Return a line for each cell of one checkpoint."""
    headers = ["self-attention", "one step", "with int8 linears", "PSNR", "worst"]
    rows = [[label, *_figures(cell)] for label, cell in found["cells"].items()]
    rows += [[label, "left out", "", "", ""] for label in found["left_out"]]
    return f"{found['checkpoint']}\n" + tabulate(rows, headers=headers, disable_numparse=True)


def _figures(cell: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{100 * cell[kind]:.3f} %" for kind in ("float", "int8"))
    each = cell.get("psnr", [])
    yield f"{sum(each) / len(each):.1f} dB" if each else ""
    yield f"{min(each):.1f} dB" if each else ""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write after each checkpoint, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=subjects.NAMES, metavar="t2v|i2v")
    parser.add_argument("--videos", type=int, default=8, help="held out, of one batch")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument(
        "--every", type=int, default=5, help="calls from one that counts to the next"
    )
    parser.add_argument("--calibration-videos", type=int, default=4)
    parser.add_argument("--no-sample", dest="sample", action="store_false", help="no PSNR")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS, metavar="CELL")
    parser.add_argument(
        "--keep", action="store_true", help="keep what --out has of cells not measured now"
    )
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for all")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    budget = record.Budget(options.budget)
    results = kept(options) if options.keep else []
    for name in options.names:
        results = merged(results, [measure(name, options, budget)])
        print(record.write(options.out, _NAME, record.settings(options), results))
    print(*map(table, results), sep="\n\n")


if __name__ == "__main__":
    main()
