"""Check the variants of attention for Hopper, then time them beside their rivals.

    python -m benchmarks.attention_variants

Every variant is checked in a process of its own that is stopped after 40 s, for a kernel whose
barriers are wrong hangs. Those that are right are timed one after the other in another process. The
whole takes less than 2 minutes.
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

from wancompile.kernels.jit import attention_hopper
from wancompile.kernels.jit.attention_hopper import Tile
from wancompile.kernels.jit.softmax_hopper import MAGIC
from wancompile.ops.attention import P_RANGE
from wancompile.quant.numerics import FP8, INT8, QMAX, quantize

MODULE = "benchmarks.attention_variants"
DEVICE = "cuda"
BF16 = torch.bfloat16
TYPES = {"int8": (INT8, BF16), "int8-fp8": (INT8, FP8), "fp8": (FP8, FP8)}  # of q and k; of v and P
VARIANTS = {
    ("polynomial 8", "int8"): Tile(polynomial=8),
    ("polynomial 0", "int8"): Tile(),
    ("polynomial 4", "int8"): Tile(polynomial=4),
    ("3 stages", "int8"): Tile(polynomial=8, stages=3),
    ("polynomial 8", "int8-fp8"): Tile(polynomial=8),
    ("polynomial 0", "int8-fp8"): Tile(),
    ("polynomial 8", "fp8"): Tile(polynomial=8),
    ("polynomial 0", "fp8"): Tile(),
}
FA3 = ("FA3", "fp8")
TIMED = ((32_760, 1.0), (75_600, 1.0), (32_760, 4.0))  # tokens, standard deviation of logits
HEADS, CHANNELS = 40, 128
SMALL = [(333, 1000), (64, 1), (200, 128), (130, 129), (5, 256), (7, 449)]  # Sq, Sk
PROFILES: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    # The standard deviation of logits, and what is added to those of a key, of its place in [0, 1].
    "constant": (0.0, lambda place: 5.0 + 0 * place),
    "rising slowly": (0.5, lambda place: 20 * place),
    "rising fast": (1.0, lambda place: 300 * place),
    "falling": (1.0, lambda place: -60 * place),
    "late": (1.0, lambda place: 20.0 * (place > 0.95)),
    "late and high": (1.0, lambda place: 300.0 * (place == 1)),
    "first": (0.3, lambda place: 7.0 * (place == 0)),
    "last": (0.3, lambda place: 7.0 * (place == 1)),
}
LIMIT_S, PROCESSES = 40, 8
MORE_THAN_ROUNDING = 1.1  # the kernel's exponentials and sums are not exact, either
ROUNDED_OUTPUT = 3e-3
HALF_BIT_FP32 = 2.0**-24
BIT_FP8_SUMS = 2.0**-13  # Hopper adds products of e4m3 with 14 bits, 32 channels at a time
Types = tuple[torch.dtype, torch.dtype]
Case = tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor | None]]  # q, k, v, scales


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", nargs=2, metavar=("VARIANT", "TYPE"))
    parser.add_argument("--time", nargs=2, metavar=("VARIANT", "TYPE"), action="append")
    given = parser.parse_args()
    if given.check is not None:
        check(*given.check)
    elif given.time is not None:
        time_all([(variant, kind) for variant, kind in given.time])
    else:
        check_then_time()


def check_then_time() -> None:
    started = time.monotonic()
    with ThreadPoolExecutor(PROCESSES) as pool:
        verdicts = list(pool.map(check_apart, VARIANTS))
    for way, verdict in zip(VARIANTS, verdicts, strict=True):
        print(f"{way[0]:14}{way[1]:6}{verdict}", flush=True)
    right = [way for way, said in zip(VARIANTS, verdicts, strict=True) if said.startswith("right")]
    options = [word for way in [FA3, *right] for word in ("--time", *way)]
    subprocess.run([sys.executable, "-m", MODULE, *options], timeout=2 * LIMIT_S, check=False)
    print(f"{torch.cuda.get_device_name()}, {time.monotonic() - started:.0f} s")


def check_apart(way: tuple[str, str]) -> str:
    """What `check` prints, or how it failed."""
    command = [sys.executable, "-m", MODULE, "--check", *way]
    try:
        done = subprocess.run(command, timeout=LIMIT_S, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {LIMIT_S} s"
    if done.returncode:
        return (done.stderr.strip() or str(done.returncode)).splitlines()[-1][:200]
    return done.stdout.strip()


def check(variant: str, kind: str) -> None:
    """Raise AssertionError unless small shapes, and samples of a large one, are right."""
    tile, types, worst = VARIANTS[variant, kind], TYPES[kind], 0.0
    for channels in (128, 64):
        for q_tokens, k_tokens in SMALL:
            case = operands((2, 3, q_tokens, k_tokens, channels), types, spread=4.0)
            worst = max(worst, excess(case, tile, torch.arange(q_tokens), range(3)))
    for name, (spread, profile) in PROFILES.items():
        for q_tokens, k_tokens in SMALL[0], (130, 4099):
            logits = profile(torch.linspace(0, 1, k_tokens, device=DEVICE))
            case = operands((1, 2, q_tokens, k_tokens, CHANNELS), types, spread, logits)
            worst = max(worst, excess(case, tile, torch.arange(q_tokens), range(2), name))
    tokens = TIMED[0][0]
    case = operands((1, HEADS, tokens, tokens, CHANNELS), types, spread=1.0)
    rows = torch.linspace(0, tokens - 1, 48).long()
    worst = max(worst, excess(case, tile, rows, (0, 17, HEADS - 1)))
    print(f"right, error at most {worst:.2f} of what is allowed")


def operands(
    shape: tuple[int, int, int, int, int],
    types: Types,
    spread: float,
    profile: Tensor | None = None,
) -> Case:
    """Random q, k, v.

    Logits have about the standard deviation `spread` around `profile [Sk]`, or 0.
    """
    batch, heads, q_tokens, k_tokens, channels = shape
    torch.manual_seed(0)
    q = spread * torch.randn(batch, heads, q_tokens, channels, device=DEVICE)
    k = torch.randn(batch, heads, k_tokens, channels, device=DEVICE)
    v = 0.3 * torch.randn(batch, heads, k_tokens, channels, device=DEVICE)
    if profile is not None:
        factor = profile.abs().max().sqrt() * channels**0.25  # of the logits; so both are as large
        q[..., 0], k[..., 0] = factor, profile * channels**0.5 / factor
    qk_type, v_type = types
    (q, q_scale), (k, k_scale) = queries_in_8_bits(q, qk_type), in_8_bits(k, qk_type)
    if v_type == BF16:
        return q, k, v.to(BF16), (q_scale, k_scale, None)
    v, v_scale = in_8_bits(v, v_type)
    return q, k, v, (q_scale, k_scale, v_scale)


def queries_in_8_bits(q: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`q` rounded, and its scales: in int8 `[B, H, S, 1]`, one for each query."""
    if dtype != INT8:
        return in_8_bits(q, dtype)
    scale = q.abs().amax(-1, keepdim=True) / QMAX[dtype]
    return quantize(q, scale, dtype), scale


def in_8_bits(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` rounded with a scale for each head, and the scales."""
    scale = x.abs().amax((0, 2, 3)) / QMAX[dtype]
    return quantize(x, scale[:, None, None], dtype), scale


def excess(
    case: Case, tile: Tile, rows: Tensor, heads: range | tuple[int, ...], name: str = ""
) -> float:
    """The largest error of a head over what rounding allows; fails if it is more than 1."""
    q, k, v, scales = case
    batch, count, tokens, channels = q.shape
    memory = torch.full((batch, tokens + 70, count, channels), torch.nan, device=DEVICE).bfloat16()
    out = memory[:, :tokens].transpose(1, 2)
    attention_hopper.launch(q, k, stored(v), scales, channels**-0.5, out, tile)
    assert memory[:, tokens:].isnan().all(), "written beyond the end"
    assert out.isfinite().all(), "not all is written, or not finite"
    worst = 0.0
    for b in range(batch):
        for head in heads:
            exact, rounded = references(case, b, head, rows)
            error = relative(out[b, head, rows].double(), exact)
            allowed = MORE_THAN_ROUNDING * relative(rounded, exact) + ROUNDED_OUTPUT
            allowed += uncertainty_of_logits(case, b, head, rows)
            said = f"{name} {tuple(q.shape)} {k.shape[2]}: error {error:.2e}, allowed {allowed:.2e}"
            assert error <= allowed, said
            worst = max(worst, error / allowed)
    return worst


def stored(v: Tensor) -> Tensor:
    """`v` as the kernel reads it; e4m3 is what `attention.transpose_values` makes."""
    batch, heads, tokens, channels = v.shape
    if v.dtype == BF16:
        return v.transpose(1, 2).reshape(batch * tokens, heads * channels)
    padded = math.ceil(tokens / 128) * 128
    raw = torch.zeros(batch, heads, padded, channels, device=DEVICE, dtype=torch.uint8)
    raw[:, :, :tokens] = v.view(torch.uint8)
    ordered = raw.view(batch * heads, padded // 16, 2, 4, 2, channels).permute(0, 5, 1, 3, 2, 4)
    return ordered.reshape(batch * heads * channels, padded).view(FP8)


def references(case: Case, b: int, head: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of some rows of one head in float64, exact and with P in the type of v."""
    v, v_scale = case[2], case[3][2]
    logits = exact_logits(case, b, head, rows)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    values = v[b, head].double() * (1.0 if v_scale is None else v_scale[head].double())
    coarse = (P_RANGE * weights).to(torch.float32).to(v.dtype).double() / P_RANGE
    total = weights.sum(-1, keepdim=True)
    return weights @ values / total, coarse @ values / total


def exact_logits(case: Case, b: int, head: int, rows: Tensor) -> Tensor:
    """The logits of some rows of one head in float64."""
    q, k = case[:2]
    products = q[b, head, rows].double() @ k[b, head].double().T
    return products.mul_(logit_factor(case, b, head, rows))


def logit_factor(case: Case, b: int, head: int, rows: Tensor) -> Tensor:
    """What products of some rows of one head are multiplied by, alike or for each row, float64."""
    q, _, _, (q_scale, k_scale, _) = case
    own = q_scale[b, head, rows] if q_scale.dim() == 4 else q_scale[head]
    return own.double() * k_scale[head].double() * q.shape[3] ** -0.5


def uncertainty_of_logits(case: Case, b: int, head: int, rows: Tensor) -> float:
    """By how much a logit may be off, which is the relative error of its weight.

    int8: the row's shift is as large as `MAGIC` times the factor of logits, and rounded to fp32.
    e4m3: sums keep 14 bits of their largest part.
    """
    q = case[0]
    if q.dtype == INT8:
        factor = float(logit_factor(case, b, head, rows).max())
        return MAGIC * factor * HALF_BIT_FP32
    largest = float(exact_logits(case, b, head, rows).abs().amax())
    return math.ceil(q.shape[3] / 32) * largest * BIT_FP8_SUMS


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def time_all(ways: list[tuple[str, str]]) -> None:
    """Print a row of TFLOP/s for each of `ways`."""
    columns = [f"{tokens:,} x {spread:g}" for tokens, spread in TIMED]
    print(f"{'TFLOP/s':20}" + "".join(f"{column:>14}" for column in columns), flush=True)
    for variant, kind in ways:
        print(f"{variant:14}{kind:6}", end="")
        for tokens, spread in TIMED:
            case = operands((1, HEADS, tokens, tokens, CHANNELS), TYPES[kind], spread)
            run = runner(variant, kind, case)
            times = triton.testing.do_bench(run, warmup=100, rep=700, return_mode="all")
            rate = 4 * tokens**2 * HEADS * CHANNELS / statistics.median(times) / 1e9
            print(f"{rate:14.0f}", end="", flush=True)
        print(flush=True)


def runner(variant: str, kind: str, case: Case) -> Callable[[], object]:
    q, k, v, scales = case
    softmax_scale = q.shape[3] ** -0.5
    if (variant, kind) == FA3:
        importlib.import_module("fa3_fwd._C")  # defines the op
        flat = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        names = ("q_descale", "k_descale", "v_descale")
        pairs = zip(names, scales, strict=True)
        named = {name: scale[None] for name, scale in pairs if scale is not None}
        return partial(torch.ops.fa3_fwd.fwd, *flat, **named, softmax_scale=softmax_scale)
    out = torch.empty(q.transpose(1, 2).shape, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    tile = VARIANTS[variant, kind]
    return partial(attention_hopper.launch, q, k, stored(v), scales, softmax_scale, out, tile)


if __name__ == "__main__":
    main()
