"""trace and compile: the dataflow of the compiler, in order."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from wancompile import passes, pipeline
from wancompile.calibrate import Calibration
from wancompile.compiled import CompiledModel
from wancompile.errors import CalibrationError, InputError
from wancompile.export import export
from wancompile.program import Program
from wancompile.quant.stats import Stats
from wancompile.recipe import Recipe, resolve
from wancompile.report import Report
from wancompile.samples import CalibData, Call, Run, drive
from wancompile.signature import name_arguments, parameters_of


def trace(
    model: torch.nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    *,
    dynamic: bool = True,
    dump: Path | None = None,
) -> Program:
    """Return `model` as a program at level NORMAL: one spelling, groups and folds proved.

    Args:
        model: a Wan transformer in whatever spelling; its weights may be on the meta device.
        example_inputs: the named (or positional) arguments of one call of `model.forward`.
        dynamic: whether batch, frames, height and width may change from call to call.
        dump: a folder for the text of every level and the diff of every pass.

    Raises:
        InputError: the inputs do not fit forward.
        ExportError: the model cannot be captured.
        DetectionError: it holds no attention.
    """
    return _normalize(model, [_named(model, example_inputs)], dynamic=dynamic, dump=dump)


def calibrate(
    model: torch.nn.Module,
    calib_data: CalibData,
    *,
    labels: int = 10,
    rows: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Stats:
    """Return the statistics of `model` on `calib_data`, to be saved, merged or compiled with."""
    _need_weights(model)
    stats, _ = _calibrate(model, calib_data, labels, rows, seed, progress, dump=None)
    return stats


def compile(
    model: torch.nn.Module,
    calib_data: CalibData | None = None,
    recipe: str | Recipe = "int8",
    *,
    stats: Stats | None = None,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    consume: bool = False,
    progress: bool = False,
    dump: Path | None = None,
) -> CompiledModel:
    """Return `model` calibrated, smoothed and quantized.

    Args:
        model: a Wan transformer with real weights. It is left as it was, also when an error is
            raised, unless `consume` is set and everything has succeeded up to quantization.
        calib_data: calls of `model.forward`, each a dict of named or a tuple of positional
            arguments, shapes may differ; or a callable that runs the model, such as a whole
            pipeline call.
        recipe: "int8", "fp8", "int8-attention", "fp8-attention" or a `Recipe`.
        stats: statistics of an earlier `calibrate`, instead of `calib_data`.
        example_inputs: one call that shows the shapes, needed where `calib_data` is not given.
        consume: let go of each original weight once it is quantized, so that host memory never
            holds both; `model` is on the meta device afterwards.
        progress: show progress bars.
        dump: a folder for the text of every level and the diff of every pass.

    Returns:
        A drop-in for `model` with a `report`. Tensors that stay in floating point are shared with
        `model`, not copied.

    Raises:
        WancompileError: with the site, the source line, the pass and the reason; see `errors`.
    """
    chosen = resolve(recipe)
    if chosen.rounds_attention and stats is None and calib_data is None:
        raise CalibrationError(
            "8-bit attention needs calibration data or statistics for its static scales"
        )
    _need_weights(model)
    program, probe, stats = _prepare(
        model, calib_data, stats, example_inputs, progress=progress, dump=dump
    )
    chosen.check(program.groups, program.attentions)
    bytes_before = program.nbytes
    smoothed = pipeline.run(
        program, passes.smoothing(chosen, stats), probe=pipeline.Probe(probe), dump=dump
    )
    if consume:
        program.release()
        model.to("meta")
        gc.collect()  # what came before `program` is tied in cycles, and shares its weights
    quantized = pipeline.run(
        smoothed, passes.quantization(chosen, stats), dump=dump, consume=consume
    )
    fused = pipeline.run(quantized, passes.FUSE, dump=dump, consume=True)
    report = Report(chosen, (), (), (), bytes_before, 0).with_program(fused)
    return CompiledModel(fused, report, getattr(model, "config", None), _dtype_of(model))


def _prepare(
    model: torch.nn.Module,
    calib_data: CalibData | None,
    stats: Stats | None,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None,
    *,
    progress: bool,
    dump: Path | None,
) -> tuple[Program, Call, Stats | None]:
    """Return the NORMAL program, one call to check folds on, and the statistics, if any."""
    if calib_data is not None:
        if stats is not None:
            raise InputError("give calib_data or stats, not both")
        found, calibration = _calibrate(model, calib_data, 10, 256, 0, progress, dump)
        return calibration.program, calibration.first_call, found
    if example_inputs is None:
        raise InputError("without calib_data, example_inputs must show one call of the model")
    call = _named(model, example_inputs)
    return _normalize(model, [call], dynamic=True, dump=dump), call, stats


class _Started:
    """A calibration, begun when the first calls are known."""

    def __init__(self, model: torch.nn.Module, dump: Path | None, **options: Any) -> None:
        self._model = model
        self._dump = dump
        self._options = options
        self.program: Program
        self.first_call: Call
        self.calibration: Calibration

    def __call__(self, calls: Sequence[Call]) -> Run:
        self.first_call = dict(calls[0])
        self.program = _normalize(self._model, calls, dynamic=True, dump=self._dump)
        self.calibration = Calibration(self.program, **self._options)
        return self.calibration.observe


def _calibrate(
    model: torch.nn.Module,
    calib_data: CalibData,
    labels: int,
    rows: int,
    seed: int,
    progress: bool,
    dump: Path | None,
) -> tuple[Stats, _Started]:
    started = _Started(model, dump, labels=labels, rows=rows, seed=seed)
    drive(model, calib_data, started, progress=progress)
    return started.calibration.stats(), started


def _normalize(
    model: torch.nn.Module, calls: Sequence[Call], *, dynamic: bool, dump: Path | None
) -> Program:
    program = export(model, calls, dynamic=dynamic)
    is_real = not any(tensor.is_meta for tensor in program.state.values())
    probe = pipeline.Probe(calls[0]) if is_real else None
    return pipeline.run(program, passes.NORMALIZE, probe=probe, dump=dump)


def _named(model: torch.nn.Module, inputs: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    parameters, defaults = parameters_of(model.forward)
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    return name_arguments(parameters, defaults, args, kwargs)


def _need_weights(model: torch.nn.Module) -> None:
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise InputError("the model's weights are on the meta device: load them first")


def _dtype_of(model: torch.nn.Module) -> torch.dtype:
    """Return the type that a pipeline should cast inputs to: that of most weights."""
    dtype = getattr(model, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
