"""Check the variants of attention for Hopper, then time them beside their rivals.

    python -m benchmarks.attention_variants

Every variant is checked, and then timed, in processes of its own that are stopped after 40 s, for a
kernel whose barriers are wrong hangs. The table comes last. The whole takes about 4 minutes.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import triton
from torch import Tensor

from wancompile.kernels.jit import attention, attention_hopper
from wancompile.kernels.jit.attention_hopper import Tile
from wancompile.ops.attention import P_RANGE
from wancompile.quant.numerics import FP8, INT8, QMAX, quantize

MODULE = "benchmarks.attention_variants"
DEVICE = "cuda"
TYPES = {"int8": INT8, "fp8": FP8}
VARIANTS = {
    "2x128 p0": Tile(),
    "2x128 p2": Tile(polynomial=2),
    "2x128 p4": Tile(polynomial=4),
    "2x128 p8": Tile(polynomial=8),
    "3x64 p0": Tile(groups=3, keys=64),
    "3x64 p4": Tile(groups=3, keys=64, polynomial=4),
}
RIVALS = {"triton": ["int8", "fp8"], "FA3": ["fp8"]}
TOKENS = (32_760, 75_600)
HEADS, CHANNELS = 40, 128
SMALL = [(333, 1000), (64, 1), (200, 128), (130, 129), (5, 256), (7, 449)]  # Sq, Sk
LIMIT_S, PROCESSES = 40, 6
MORE_THAN_ROUNDING = 1.1  # p is rounded relative to another maximum than in the reference
BF16 = 3e-3
Case = tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]  # q, k, v, scales


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", nargs=2, metavar=("VARIANT", "TYPE"))
    parser.add_argument("--time", nargs="+", metavar=("VARIANT", "TYPE"))
    given = parser.parse_args()
    if given.check is not None:
        check(*given.check)
    elif given.time is not None:
        time_one(given.time[0], given.time[1:])
    else:
        check_then_time()


def check_then_time() -> None:
    started = time.monotonic()
    ways = [(variant, kind) for variant in VARIANTS for kind in TYPES]
    with ThreadPoolExecutor(PROCESSES) as pool:
        verdicts = list(pool.map(partial(run_apart, "--check"), ways))
    good: dict[str, list[str]] = {variant: [] for variant in VARIANTS}
    for (variant, kind), verdict in zip(ways, verdicts, strict=True):
        print(f"{variant:20}{kind:6}{verdict}", flush=True)
        if verdict.startswith("right"):
            good[variant].append(kind)
    timed = [(name, *kinds) for name, kinds in {**RIVALS, **good}.items() if kinds]
    tables = [run_apart("--time", way) for way in timed]
    print(f"\n{'TFLOP/s':26}" + "".join(f"{tokens:>10,}" for tokens in TOKENS), *tables, sep="\n")
    print(f"{torch.cuda.get_device_name()}, {time.monotonic() - started:.0f} s")


def run_apart(task: str, way: tuple[str, ...]) -> str:
    """What this module prints for one way, or how it failed."""
    command = [sys.executable, "-m", MODULE, task, *way]
    try:
        done = subprocess.run(command, timeout=LIMIT_S, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        return f"{way}: stopped after {LIMIT_S} s"
    if done.returncode:
        return f"{way}: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1][:200]}"
    return done.stdout.strip()


def check(variant: str, kind: str) -> None:
    """Raise AssertionError unless small shapes, and samples of a large one, are right."""
    tile, worst = VARIANTS[variant], 0.0
    for channels in (128, 64) if tile == Tile() else (128,):
        for q_tokens, k_tokens in SMALL:
            case = operands((2, 3, q_tokens, k_tokens, channels), TYPES[kind], spread=4.0)
            worst = max(worst, excess(case, tile, torch.arange(q_tokens), range(3)))
    case = operands((1, HEADS, TOKENS[0], TOKENS[0], CHANNELS), TYPES[kind], spread=1.0)
    rows = torch.linspace(0, TOKENS[0] - 1, 48).long()
    worst = max(worst, excess(case, tile, rows, (0, 17, HEADS - 1)))
    print(f"right, error at most {worst:.2f} of what is allowed")


def operands(shape: tuple[int, int, int, int, int], dtype: torch.dtype, spread: float) -> Case:
    """Random q, k, v in 8 bits; logits have about the standard deviation `spread`."""
    batch, heads, q_tokens, k_tokens, channels = shape
    torch.manual_seed(0)
    made = []
    sides = (q_tokens, spread, dtype), (k_tokens, 1.0, dtype), (k_tokens, 0.3, FP8)
    for tokens, size, kind in sides:
        x = size * torch.randn(batch, heads, tokens, channels, device=DEVICE)
        scale = x.abs().amax((0, 2, 3)) / QMAX[kind]
        made.append((quantize(x, scale[:, None, None], kind), scale))
    (q, q_scale), (k, k_scale), (v, v_scale) = made
    return q, k, v, (q_scale, k_scale, v_scale)


def excess(case: Case, tile: Tile, rows: Tensor, heads: range | tuple[int, ...]) -> float:
    """The largest error of a head over what rounding allows; fails if it is more than 1."""
    q, k, v, scales = case
    batch, count, tokens, channels = q.shape
    memory = torch.full((batch, tokens + 70, count, channels), torch.nan, device=DEVICE).bfloat16()
    out = memory[:, :tokens].transpose(1, 2)
    attention_hopper.launch(q, k, transposed(v), scales, channels**-0.5, out, tile)
    assert memory[:, tokens:].isnan().all(), "written beyond the end"
    assert out.isfinite().all(), "not all is written, or not finite"
    worst = 0.0
    for b in range(batch):
        for head in heads:
            exact, rounded = references(case, b, head, rows)
            error = relative(out[b, head, rows].double(), exact)
            allowed = MORE_THAN_ROUNDING * relative(rounded, exact) + BF16
            said = f"{tuple(q.shape)} {k.shape[2]}: error {error:.2e}, allowed {allowed:.2e}"
            assert error <= allowed, said
            worst = max(worst, error / allowed)
    return worst


def transposed(v: Tensor) -> Tensor:
    """What `attention.transpose_values` makes, in plain PyTorch."""
    batch, heads, tokens, channels = v.shape
    padded = math.ceil(tokens / 128) * 128
    raw = torch.zeros(batch, heads, padded, channels, device=DEVICE, dtype=torch.uint8)
    raw[:, :, :tokens] = v.view(torch.uint8)
    ordered = raw.view(batch * heads, padded // 16, 2, 4, 2, channels).permute(0, 5, 1, 3, 2, 4)
    return ordered.reshape(batch * heads * channels, padded).view(FP8)


def references(case: Case, b: int, head: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of some rows of one head in float64, exact and with P in e4m3."""
    q, k, v, scales = case
    q_scale, k_scale, v_scale = (scale[head].double() for scale in scales)
    logits = q[b, head, rows].double() @ k[b, head].double().T
    logits *= q_scale * k_scale * q.shape[3] ** -0.5
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    values = v[b, head].double() * v_scale
    coarse = (P_RANGE * weights).to(torch.float32).to(FP8).double() / P_RANGE
    total = weights.sum(-1, keepdim=True)
    return weights @ values / total, coarse @ values / total


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def time_one(variant: str, kinds: list[str]) -> None:
    """Print a row of TFLOP/s for each of `kinds`, a column for each count of tokens."""
    for kind in kinds:
        rates = []
        for tokens in TOKENS:
            run = runner(variant, operands((1, HEADS, tokens, tokens, CHANNELS), TYPES[kind], 1.0))
            run()
            times = triton.testing.do_bench(run, warmup=100, rep=1000, return_mode="all")
            rates.append(4 * tokens**2 * HEADS * CHANNELS / statistics.median(times) / 1e9)
        print(f"{variant:20}{kind:6}" + "".join(f"{rate:10.0f}" for rate in rates), flush=True)


def runner(variant: str, case: Case) -> Callable[[], object]:
    q, k, v, scales = case
    softmax_scale = q.shape[3] ** -0.5
    if variant == "FA3":
        importlib.import_module("fa3_fwd._C")  # defines the op
        flat = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        names = ("q_descale", "k_descale", "v_descale")
        named = {name: scale[None] for name, scale in zip(names, scales, strict=True)}
        return partial(torch.ops.fa3_fwd.fwd, *flat, **named, softmax_scale=softmax_scale)
    out = torch.empty(q.transpose(1, 2).shape, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    if variant == "triton":  # which transposes v itself, a hundredth of its time
        return partial(attention.launch, q, k, v, scales, softmax_scale, out)
    tile = VARIANTS[variant]
    return partial(attention_hopper.launch, q, k, transposed(v), scales, softmax_scale, out, tile)


if __name__ == "__main__":
    main()
