"""Models with random weights, their inputs, and time and memory on CUDA and CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.h100_plan import Row
from wancompile import presets
from wancompile.presets import Latent

Forward = Callable[[], Any]

_SEED = 0
# What a checkpoint holds is of this order. As diffusers initializes them the gates are so small
# that a model hardly adds to its input, and no rounding shows in its output.
_MODULATION = 0.5
_CALIBRATION: Latent = (5, 30, 52)
_TINY_CALIBRATION: Latent = (2, 4, 8)


def build(row: Row, layers: int, device: torch.device, tiny: bool) -> nn.Module:
    """Return a model of bf16 weights, the same in every process of one machine."""
    torch.manual_seed(_SEED)
    model = presets.build(row.preset_of(layers, tiny), device=device)
    for name, parameter in model.named_parameters():
        if name.endswith("scale_shift_table"):
            parameter.data.normal_(0, _MODULATION)
    clear(device)
    return model.requires_grad_(False)


def inputs(row: Row, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Return one call at the size of the row, the same in every process of one machine."""
    return _inputs(row, row.size(tiny), device, tiny)


def calibration(row: Row, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Return a short call that shows the sizes of random activations to the compiler."""
    return _inputs(row, _TINY_CALIBRATION if tiny else _CALIBRATION, device, tiny)


def _inputs(row: Row, latent: Latent, device: torch.device, tiny: bool) -> dict[str, Any]:
    torch.manual_seed(_SEED + 1)
    preset = row.preset_of(1, tiny)
    return {
        **presets.example_inputs(preset, latent=latent, device=device),
        "return_dict": False,
    }


def milliseconds(forward: Forward, device: torch.device) -> float:
    """Time one forward, by CUDA events where there are some."""
    synchronize(device)
    if device.type != "cuda":
        started = time.perf_counter()
        forward()
        return 1e3 * (time.perf_counter() - started)
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    start.record()
    forward()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def seconds(run: Forward, device: torch.device) -> float:
    """Time what keeps the host busy, too, until the device is done with it."""
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clear(device: torch.device) -> None:
    """Give unused memory back to the card, where other processes need it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def allocated_gib(device: torch.device) -> float:
    """Memory in use on the card by this process, 0 on a CPU."""
    return torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def peak_gib(forward: Forward, device: torch.device, base_gib: float) -> float | None:
    """Return the memory that one forward needs at most, beyond `base_gib` of other things."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    forward()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**30 - base_gib


def rates(device: torch.device, size: int = 8192) -> dict[str, float]:
    """Return what this card does at best: GB/s of a copy, TFLOP/s of square matrix products."""
    size = size if device.type == "cuda" else 256
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    source = torch.randn(8 * size, size, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    runs: dict[str, Forward] = {
        "bf16": lambda: a @ b.t(),
        **_products_8bit(a, b),
    }
    work = 2 * size**3 / 1e9
    found = {name: work / _median_ms(run, device) for name, run in runs.items()}
    found["copy"] = 2 * source.nbytes / 1e6 / _median_ms(lambda: target.copy_(source), device)
    return found


def _products_8bit(a: Tensor, b: Tensor) -> dict[str, Forward]:
    if a.device.type != "cuda":
        return {}
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    ai, bi = (x.mul(32).clamp(-127, 127).to(torch.int8) for x in (a, b))
    one = torch.ones((), device=a.device)
    return {
        "fp8": lambda: torch._scaled_mm(
            a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        "int8": lambda: torch._int_mm(ai, bi.t()),
    }


def _median_ms(run: Forward, device: torch.device) -> float:
    for _ in range(3):
        run()
    return statistics.median(milliseconds(run, device) for _ in range(20))
