"""Time every Triton kernel beside its floor and its rivals, at the shapes of Wan 14B, on one H100.

    python -m benchmarks.kernels kernels.json

Each part runs in a process of its own: one that crashes is reported and the rest goes on. Every
result is first checked on a sample, against the plain body or against float64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.elementwise import time_norms, time_projections, time_quantize
from benchmarks.timing import (
    DEVICE,
    HEAD_SIZE,
    HEADS,
    TOKENS,
    Row,
    activations,
    checked,
    head_scale,
    label,
    measure,
    relative,
)
from wancompile import ops
from wancompile.kernels.jit import attention, linear
from wancompile.kernels.torch_attention import attention_cudnn
from wancompile.kernels.triton_quantize import quantize_per_head_triton, quantize_per_token_triton
from wancompile.ops.attention import empty_output
from wancompile.quant.numerics import FP8, INT8

LINEARS = {"5120 -> 5120": (5120, 5120), "up": (5120, 13824), "down": (13824, 5120)}
TEXT_TOKENS = 512
PART_LIMIT_S = 150

LINEAR_TILES = {
    "128x256x128 s4": linear.Tile(),
    "128x256x128 s3 persistent": linear.Tile(stages=3, persistent=True),
    "128x256x128 s4 persistent": linear.Tile(stages=4, persistent=True),
    "128x256x128 s4 group 16": linear.Tile(group=16),
}
ATTENTION_TILES = {
    "128x64 w8 s3 r128": attention.Tile(128, 64, 8, 3, 128),
    "128x64 w8 s2 r128": attention.Tile(128, 64, 8, 2, 128),
    "256x64 w16 s3 r128": attention.Tile(256, 64, 16, 3, 128),
    "64x128 w4 s2 r168": attention.Tile(64, 128, 4, 2, 168),
    "64x128 w4 s2 r168 biased": attention.Tile(64, 128, 4, 2, 168, biased=True),
    "64x128 w4 s3": attention.Tile(64, 128, 4, 3),
    "64x128 w4 s3 biased": attention.Tile(64, 128, 4, 3, biased=True),
    "128x128 w8 s3": attention.Tile(128, 128, 8, 3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", choices=PARTS)
    given = parser.parse_args()
    if given.part is not None:
        save(given.out, PARTS[given.part]())
        return
    started = time.time()
    rows: list[dict] = []
    for part in PARTS:
        rows += run_apart(part)
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
              "triton": triton.__version__, "rows": rows}  # fmt: skip
    given.out.write_text(json.dumps(report, indent=1))
    print_table(rows)
    print(f"{report['device']}, torch {torch.__version__}, triton {triton.__version__}, "
          f"{time.time() - started:.0f} s")  # fmt: skip


def run_apart(part: str) -> list[dict]:
    """The rows of one part, those before a crash included."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.kernels", str(out), "--part", part]
        try:
            code = subprocess.run(command, timeout=PART_LIMIT_S, check=False).returncode
            failure = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            failure = f"stopped after {PART_LIMIT_S} s"
        rows = json.loads(out.read_text()) if out.exists() else []
    return [*rows, asdict(Row(part, "", "", note=failure))] if failure else rows


def save(out: Path, rows: Iterator[Row]) -> None:
    """Write after each row, so that a crash loses none."""
    done = []
    for row in rows:
        done.append(asdict(row))
        print(f"{row.part} {row.shape} {row.name}: {row.ms} ms {row.note}", flush=True)
        out.write_text(json.dumps(done))


# ---------------------------------------------------------------- linears


def time_linears() -> Iterator[Row]:
    for resolution, tokens in TOKENS.items():
        for name, (depth, columns) in LINEARS.items():
            x = activations(tokens, depth)
            weight = torch.randn(columns, depth, device=DEVICE, dtype=torch.bfloat16)
            for dtype in (INT8, FP8):
                shape = f"{resolution} {name} {label(dtype)}"
                yield from time_linear(shape, x, weight, dtype)
            multiply = partial(F.linear, x, weight)
            row = Row("linear", f"{resolution} {name}", "bf16 torch")
            yield measure(row, 2 * x.shape[0] * weight.numel(), multiply)


def time_linear(shape: str, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Iterator[Row]:
    q, scale = quantize_per_token_triton(x, None, dtype)
    w8, weight_scale = quantize_per_token_triton(weight, None, dtype)
    bias = torch.randn(weight.shape[0], device=DEVICE, dtype=torch.bfloat16)
    out = torch.empty(x.shape[0], weight.shape[0], device=DEVICE, dtype=torch.bfloat16)
    work = 2 * x.shape[0] * weight.numel()
    sample = torch.cat([torch.arange(64), torch.arange(x.shape[0] - 64, x.shape[0])]).to(DEVICE)
    plain = ops.scaled_linear(q[sample], scale[sample], w8, weight_scale, bias, out.dtype)
    for name, tile in LINEAR_TILES.items():

        def run(tile: linear.Tile = tile) -> None:
            linear.launch(q, scale, w8, weight_scale, bias, out, tile)

        def error() -> float:
            run()
            return relative(out[sample], plain)

        row = checked(Row("linear", shape, name), error)
        yield measure(row, work, run)
    yield measure(Row("linear", shape, "rival"), work, rival_linear(q, scale, w8, weight_scale))


def rival_linear(q: Tensor, scale: Tensor, w8: Tensor, weight_scale: Tensor) -> Callable:
    """`_int_mm`, which leaves int32 sums without scales, or `_scaled_mm` with row-wise scales."""
    if q.dtype == INT8:
        return lambda: torch._int_mm(q, w8.t())
    return lambda: torch._scaled_mm(q, w8.t(), scale_a=scale, scale_b=weight_scale.t(),
                                    out_dtype=torch.bfloat16, use_fast_accum=True)  # fmt: skip


# ---------------------------------------------------------------- attention


def time_attention() -> Iterator[Row]:
    for resolution, tokens in TOKENS.items():
        q, k, v = (torch.randn(1, HEADS, tokens, HEAD_SIZE, device=DEVICE, dtype=torch.bfloat16)
                   for _ in range(3))  # fmt: skip
        work = 4 * HEADS * tokens**2 * HEAD_SIZE
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

            def sdpa(q=q, k=k, v=v, backend=backend) -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v)

            yield measure(Row("attention", resolution, f"bf16 {backend.name.lower()}"), work, sdpa)
        for dtype in (INT8, FP8):
            yield from time_quantized_attention(resolution, q, k, v, dtype, work)


def time_cross_attention() -> Iterator[Row]:
    """bf16 attention of all queries to the 512 tokens of a text."""
    for resolution, tokens in TOKENS.items():
        q, k, v = (activations(1, count, HEADS, HEAD_SIZE).transpose(1, 2)
                   for count in (tokens, TEXT_TOKENS, TEXT_TOKENS))  # fmt: skip
        work = 4 * HEADS * tokens * TEXT_TOKENS * HEAD_SIZE
        exact = sampled(
            F.scaled_dot_product_attention(q[:, :, :40].double(), k.double(), v.double())
        )

        def cudnn(q=q, k=k, v=v) -> Tensor:
            return attention_cudnn(q, k, v, None, 0.0, False, None, False)

        def torch_default(q=q, k=k, v=v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

        for name, run in (("cudnn", cudnn), ("torch", torch_default)):
            row = Row("cross", f"{resolution} x {TEXT_TOKENS}", f"bf16 {name}")
            row = checked(
                row, lambda run=run, exact=exact: relative(sampled(run()[:, :, :40]), exact)
            )
            yield measure(row, work, run)


def time_quantized_attention(
    resolution: str, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, work: float
) -> Iterator[Row]:
    types = dtype, dtype, FP8
    scales = tuple(head_scale(t, to) for t, to in zip((q, k, v), types, strict=True))
    data = [
        quantize_per_head_triton(t, s, to)
        for t, s, to in zip((q, k, v), scales, types, strict=True)
    ]
    if dtype == INT8:  # each query has a scale of its own, as recipes give it
        data[0], q_scale = quantize_per_token_triton(q, None, dtype)
        scales = q_scale, *scales[1:]
    softmax_scale = HEAD_SIZE**-0.5
    out = empty_output(q, q.dtype)
    reference = attention_sample(*data, scales, softmax_scale)
    for name, tile in ATTENTION_TILES.items():

        def run(tile: attention.Tile = tile) -> None:
            attention.launch(*data, scales, softmax_scale, out, tile)

        def error() -> float:
            run()
            return relative(sampled(out), reference)

        row = checked(Row("attention", f"{resolution} {label(dtype)}", name), error)
        yield measure(row, work, run)


def sampled(x: Tensor) -> Tensor:
    """The first and the last 40 queries of the first and the last head."""
    return torch.cat([x[:, [0, -1], :40], x[:, [0, -1], -40:]], 2)


def attention_sample(
    q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, ...], softmax_scale: float
) -> Tensor:
    """float64 attention of the sampled queries: what is left is the rounding of P."""
    ends = [0, -1]
    q_scale, *rest = scales
    own = sampled(q_scale) if q_scale.dim() == 4 else q_scale[ends][:, None, None]
    qd = sampled(q).double() * own.double()
    kd, vd = (
        t[:, ends].double() * s[ends].double()[:, None, None]
        for t, s in zip((k, v), rest, strict=True)
    )
    return torch.softmax(qd @ kd.transpose(-1, -2) * softmax_scale, -1) @ vd


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "quantize": time_quantize,
    "norm": time_norms,
    "project": time_projections,
    "linear": time_linears,
    "attention": time_attention,
    "cross": time_cross_attention,
}


def print_table(rows: list[dict]) -> None:
    print(f"\n{'part':10}{'shape':24}{'what':28}{'ms':>9}{'spread':>8}{'rate':>8}{'/floor':>8}"
          f"{'error':>10}")  # fmt: skip
    for row in rows:
        cells = (cell(row["ms"], "9.3f"), cell(row["spread"], "8.2f"), cell(row["rate"], "8.0f"),
                 cell(row["floor"], "8.2f"), cell(row["error"], "10.1e"))  # fmt: skip
        print(f"{row['part']:10}{row['shape']:24}{row['name']:28}{''.join(cells)}  {row['note']}")


def cell(value: float | None, form: str) -> str:
    return " " * int(form.split(".")[0]) if value is None else format(value, form)


if __name__ == "__main__":
    main()
