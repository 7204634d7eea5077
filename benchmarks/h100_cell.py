"""One cell of the table, measured in a process of its own."""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import wancompile
from benchmarks import h100_model as models
from benchmarks import h100_peers as peers
from benchmarks import h100_profile as profiles
from benchmarks.h100_plan import DEEP, SHALLOW, Job
from benchmarks.h100_turns import Turn
from wancompile.compiled import CompiledModel


@dataclass(frozen=True)
class Options:
    """How to measure: on which device, how often, where to leave outputs for the comparison."""

    device: str
    repeats: int
    with_profile: bool
    folder: Path


@dataclass
class _Subject:
    """A model ready to run, and the memory that it needs while it does."""

    forward: Callable[[], Any]
    model: Callable[..., Any]
    peak_gib: float | None


def measure(turn: Turn, job: Job, options: Options) -> None:
    """Measure one cell and report its figures as they come."""
    device = torch.device(options.device)
    cache = cache_folder(options.folder, job.column.family)
    turn.report(cold=_is_cold(cache))
    with torch.no_grad():
        if job.column.kind == "reference":
            _run_reference(job, options, device)
        elif job.column.kind == "whole":
            _measure_whole(turn, job, options, device)
        else:
            _measure_layers(turn, job, options, device)


def output_file(folder: Path, row: str, column: str) -> Path:
    """Return where a cell leaves the output of its deep model."""
    return folder / f"{row}.{column}.pt"


def relative_error(folder: Path, row: str, column: str) -> float | None:
    """Return the relative L2 distance of a cell's output from fp32's.

    None where one of them is missing, and where it is no number.
    """
    files = [output_file(folder, row, one) for one in (column, "reference")]
    if not all(file.exists() for file in files):
        return None
    out, exact = (torch.load(file, map_location="cpu").double() for file in files)
    error = float((out - exact).norm() / exact.norm())
    return error if math.isfinite(error) else None


def cache_folder(folder: Path, family: str) -> Path:
    """Return where the columns of one family keep their compiled kernels."""
    return folder / "cache" / family


def _is_cold(cache: Path) -> bool:
    return not any(path.is_file() for path in cache.rglob("*"))


def _run_reference(job: Job, options: Options, device: torch.device) -> None:
    model = peers.exact(models.build(job.row, DEEP, device, job.tiny))
    call = models.inputs(job.row, device, job.tiny)
    call = {
        name: value.float() if torch.is_tensor(value) else value for name, value in call.items()
    }
    _keep(job, options, model(**call))


def _keep(job: Job, options: Options, out: Any) -> None:
    tensor: Tensor = out[0]
    file = output_file(options.folder, job.row.name, job.column.name)
    part = file.with_suffix(".part")
    torch.save(tensor.float().cpu(), part)
    part.rename(file)  # the scheduler may look at any time


def _measure_layers(turn: Turn, job: Job, options: Options, device: torch.device) -> None:
    call = models.inputs(job.row, device, job.tiny)
    deep = _ready(turn, job, device, DEEP, call)
    _keep(job, options, deep.forward())
    shallow = _ready(turn, job, device, SHALLOW, call)
    both = {str(DEEP): deep, str(SHALLOW): shallow}
    turn.report(peak_gib={layers: one.peak_gib for layers, one in both.items()})
    turn.take()
    for one in both.values():
        one.forward()
    times: dict[str, list[float]] = {layers: [] for layers in both}
    for _ in range(options.repeats):
        for layers, one in both.items():
            times[layers].append(models.milliseconds(one.forward, device))
    turn.report(forward_ms=times)
    if options.with_profile:
        _profile(turn, job, deep, shallow, call, device)
    turn.give_back()


def _ready(turn: Turn, job: Job, device: torch.device, layers: int, call: Any) -> _Subject:
    """Build a model, bring it into the form that the column runs, and call it twice."""
    base = models.allocated_gib(device)
    started = time.monotonic()
    model: Any = models.build(job.row, layers, device, job.tiny)
    if job.column.kind == "ours":
        model = _compiled_by_us(job, model, device)
        _span(turn, layers, "compile_s", started)
    else:
        model = peers.prepare(job.column, model, turn)
    forward = functools.partial(model, **call)
    started = time.monotonic()
    forward()
    models.synchronize(device)
    _span(turn, layers, "first_call_s", started)
    turn.give_back()
    peak = models.peak_gib(forward, device, base)
    models.clear(device)
    return _Subject(forward, model, peak)


def _span(turn: Turn, layers: int, name: str, started: float) -> None:
    # The shallow model finds kernels in the cache: only the deep one's times mean something.
    if layers != SHALLOW:
        turn.report_span(name, started, time.monotonic())


def _compiled_by_us(job: Job, model: Any, device: torch.device) -> CompiledModel:
    call = models.calibration(job.row, device, job.tiny)
    compiled = wancompile.compile(
        model, [call], recipe=job.column.recipe, consume=True, limits=None
    )
    del model
    gc.collect()
    models.clear(device)
    return compiled


def _profile(
    turn: Turn, job: Job, deep: _Subject, shallow: _Subject, call: Any, device: torch.device
) -> None:
    if job.column.kind == "ours":
        turn.report(rates=models.rates(device))
        more, less = (
            profiles.node_entries(one.model, call, device, 3)  # type: ignore[arg-type]
            for one in (deep, shallow)
        )
    elif device.type == "cuda":
        more, less = (profiles.kernel_entries(one.forward) for one in (deep, shallow))
    else:
        return
    turn.report(profile=profiles.per_layer(more, less, DEEP - SHALLOW))


def _measure_whole(turn: Turn, job: Job, options: Options, device: torch.device) -> None:
    """Compile the model with all its layers, or as many as a tiny one has, and run it."""
    layers = job.row.preset_of(None, job.tiny).config["num_layers"]
    call = models.inputs(job.row, device, job.tiny)
    model: Any = models.build(job.row, layers, device, job.tiny)
    started = time.monotonic()
    compiled = _compiled_by_us(job, model, device)
    turn.report_span("compile_s", started, time.monotonic())
    turn.report(layers=layers, weights_gib=compiled.nbytes / 2**30)
    forward = functools.partial(compiled, **call)
    started = time.monotonic()
    forward()
    models.synchronize(device)
    turn.report_span("first_call_s", started, time.monotonic())
    turn.report(peak_gib={str(layers): models.peak_gib(forward, device, 0.0)})
    turn.take()
    forward()
    repeats = range(min(3, options.repeats))
    times = [models.milliseconds(forward, device) for _ in repeats]
    turn.report(forward_ms={str(layers): times})
    turn.give_back()
