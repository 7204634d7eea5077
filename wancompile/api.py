"""trace and compile: the dataflow of the compiler, in order."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from wancompile import passes, pipeline
from wancompile.auto import choose_recipe
from wancompile.calibrate import Calibration
from wancompile.compiled import CompiledModel
from wancompile.errors import CalibrationError, InputError
from wancompile.export import export
from wancompile.gate.evidence import Evidence, HoldBack
from wancompile.gate.limits import DEFAULT, Limits
from wancompile.gate.rounds import Rounds
from wancompile.program import Program
from wancompile.quant.stats import Stats
from wancompile.recipe import Auto, Recipe, resolve
from wancompile.report import Report
from wancompile.resume import Resumable
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
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    total: int | None = None,
    progress: bool = False,
) -> Stats:
    """Return the statistics of `model` on `calib_data`, to be saved, merged or compiled with.

    Args:
        model: a Wan transformer with real weights; it is left as it was.
        calib_data: as for `compile`; a `Sample` is a call that says its kind.
        labels: number of equal timestep ranges whose statistics are kept apart.
        rows: tokens sampled of each value that linears read.
        seed: draws the sample; runs to be merged need different seeds.
        device: where to run. Weights that are elsewhere come and go, a gigabyte at a time.
        checkpoint: a file that is written as calibration goes on, and when it is interrupted; it
            holds a `Stats`. With the same model, data and options a later run skips the calls that
            are in it. A callable is played from its start: what is in the file then runs without
            being observed.
        total: the number of calls to expect, for the time left in the progress bar; a sequence
            knows its own.
        progress: show a progress bar.

    Raises:
        WancompileError: as for `compile`; a `CalibrationError` where the checkpoint is one of
            another model, other data or other options.
    """
    _need_weights(model)
    options = {"labels": labels, "rows": rows, "seed": seed}
    path = None if checkpoint is None else Path(checkpoint)
    where = _device(device)
    started = _Started(model, calib_data, where, path, None, gated=False, **options)
    return started.drive(total=total, progress=progress)


def compile(
    model: torch.nn.Module,
    calib_data: CalibData | None = None,
    recipe: str | Recipe | Auto = "int8",
    *,
    stats: Stats | None = None,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    consume: bool = False,
    device: torch.device | str | None = None,
    limits: Limits | None = DEFAULT,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    dump: Path | None = None,
) -> CompiledModel:
    """Return `model` calibrated, smoothed, quantized, and compared with what it was.

    Of `calib_data` every ninth call from the fourth on, four at most, is kept from calibration; on
    them the result is compared with the original. Of fewer than four calls none can be spared: then
    the first is compared, and without data the example. What is beyond its limit falls back to
    higher precision, as the report says.

    Args:
        model: a Wan transformer with real weights. It is left as it was, also when an error is
            raised, unless `consume` is set and everything has succeeded up to quantization.
        calib_data: calls of `model.forward`, each a dict of named or a tuple of positional
            arguments, or a `Sample` of one, shapes may differ; or a callable that runs the model,
            such as a whole pipeline call.
        recipe: "int8", "fp8", "int8-attention", "fp8-attention", a `Recipe`, or a budget for one,
            as `Recipe.auto` makes it: then each site gets a type that suits it, by the errors
            measured on two of the calls kept, which takes half a forward a site, type and call.
        stats: statistics of an earlier `calibrate`, instead of `calib_data`.
        example_inputs: one call that shows the shapes, needed where `calib_data` is not given.
        consume: let go of each original weight once it is quantized, so that host memory never
            holds both; `model` is on the meta device afterwards, also where the result is too far
            from it. Groups still fall back for errors of their own, for those are known before.
        device: where calibration, the search for smooth scales and rounding compute. Weights that
            are elsewhere come and go, a gigabyte at a time; the result is where `model` was.
        limits: what the result is held to; None compares nothing.
        checkpoint: a file for calibration to go on from, as for `calibrate`. Calls that are kept
            from calibration are not in it and run again, so one that `calibrate` made is refused.
        progress: show progress bars.
        dump: a folder for the text of every level and the diff of every pass.

    Returns:
        A drop-in for `model` with a `report`. Tensors that stay in floating point are shared with
        `model`, not copied.

    Raises:
        GateError: the result is too far from `model`, whatever fell back.
        WancompileError: with the site, the source line, the pass and the reason; see `errors`.
    """
    chosen = recipe if isinstance(recipe, Auto) else resolve(recipe)
    if stats is None and calib_data is None:
        _can_do_without_data(chosen)
    _need_weights(model)
    where = _device(device)
    gated = limits is not None or isinstance(chosen, Auto)
    program, call, stats, evidence = _prepare(
        model,
        calib_data,
        stats,
        example_inputs,
        where,
        gated,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        progress=progress,
        dump=dump,
    )
    choice = None
    if isinstance(chosen, Auto):
        choice = choose_recipe(chosen, program, evidence, stats, device=where, progress=progress)
        chosen = choice.recipe
    chosen.check(program.groups, program.attentions)
    gc.collect()  # the observed program is tied in cycles, and as large as the statistics
    bytes_before = program.nbytes
    probe = pipeline.Probe(call, where)
    rounds = Rounds(chosen, stats, limits, evidence, probe, where, dump)
    smoothed = rounds.smooth(program)
    if consume:
        program.release()
        model.to("meta")
        gc.collect()  # what came before `program` is tied in cycles, and shares its weights
    quantized = rounds.quantize(program, smoothed, consume=consume)
    fused = pipeline.run(quantized, passes.FUSE, dump=dump, consume=True)
    gate = rounds.finish(fused)
    report = Report(rounds.recipe, (), (), (), bytes_before, 0, choice, gate).with_program(fused)
    config = getattr(model, "config", None)
    return CompiledModel(fused, report, config, _dtype_of(model), evidence)


def _can_do_without_data(asked: Recipe | Auto) -> None:
    if isinstance(asked, Auto):
        raise CalibrationError("a budget needs calibration data or statistics to choose types by")
    if asked.rounds_attention:
        raise CalibrationError(
            "8-bit attention needs calibration data or statistics for its static scales"
        )


def _prepare(
    model: torch.nn.Module,
    calib_data: CalibData | None,
    stats: Stats | None,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None,
    device: torch.device | None,
    gated: bool,
    *,
    checkpoint: Path | None,
    progress: bool,
    dump: Path | None,
) -> tuple[Program, Call, Stats | None, Evidence | None]:
    """Return the NORMAL program, one call to check folds on, and the statistics, if any.

    Last comes what the gate compares with, where it is wanted.
    """
    if calib_data is not None:
        if stats is not None:
            raise InputError("give calib_data or stats, not both")
        started = _Started(model, calib_data, device, checkpoint, dump, gated=gated)
        found = started.drive(progress=progress)
        return started.program, started.first_call, found, started.evidence()
    if checkpoint is not None:
        raise InputError("a checkpoint is one of calibration, which needs calib_data")
    if example_inputs is None:
        raise InputError("without calib_data, example_inputs must show one call of the model")
    call = _beside(model, _named(model, example_inputs))
    program = _normalize(model, [call], device=device, dump=dump)
    return program, call, stats, Evidence.of(program, [call], device=device) if gated else None


class _Started:
    """A calibration, begun when the first calls are known."""

    def __init__(
        self,
        model: torch.nn.Module,
        data: CalibData,
        device: torch.device | None,
        checkpoint: Path | None,
        dump: Path | None,
        *,
        gated: bool,
        **options: int,
    ) -> None:
        self._model = model
        self._data = data
        self._device = device
        self._checkpoint = checkpoint
        self._dump = dump
        self._options = options
        self._gated = gated
        self._resumable: Resumable | None = None
        self._held: HoldBack | None = None
        self._calibration: Calibration
        self.program: Program
        self.first_call: Call

    def drive(self, *, total: int | None = None, progress: bool) -> Stats:
        """Run all calls and return what was learned."""
        try:
            drive(self._model, self._data, self, total=total, progress=progress)
        finally:  # an interrupted run is kept, too
            if self._resumable is not None:
                self._resumable.keep()
        if self._resumable is not None:
            self._resumable.finish()
        return self._calibration.stats()

    def __call__(self, calls: Sequence[Call]) -> Run:
        """Trace the model on its first calls, and return what observes every call."""
        beside = [_beside(self._model, call) for call in calls]
        self.first_call = beside[0]
        self.program = _normalize(self._model, beside, device=self._device, dump=self._dump)
        path, device = self._checkpoint, self._device
        undo = path is not None
        self._calibration = Calibration(self.program, device=device, undo=undo, **self._options)
        observe: Run = self._calibration.observe
        if path is not None:
            live = callable(self._data)
            # Which calls count depends on it, too.
            options = {"held_back": self._gated, **self._options}
            self._resumable = Resumable(self._calibration, path, options, live=live)
            observe = self._resumable
        if self._gated:
            observe = self._held = HoldBack(self._calibration, self.program, device, observe)
        return lambda call, label: observe(_beside(self._model, call), label)

    def evidence(self) -> Evidence | None:
        """Return what the gate compares with: the calls held back, or the first one."""
        if self._held is None:
            return None
        if self._held.held:
            return self._held.evidence()
        return Evidence.of(self.program, [self.first_call], device=self._device)


def _normalize(
    model: torch.nn.Module,
    calls: Sequence[Call],
    *,
    dynamic: bool = True,
    device: torch.device | None = None,
    dump: Path | None,
) -> Program:
    program = export(model, calls, dynamic=dynamic)
    is_real = not any(tensor.is_meta for tensor in program.state.values())
    probe = pipeline.Probe(calls[0], device) if is_real else None
    return pipeline.run(program, passes.NORMALIZE, probe=probe, dump=dump)


def _device(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot compute on the device {device!r}: {reason}") from error
    return found


def _beside(model: torch.nn.Module, call: Call) -> Call:
    """Return the call with its tensors where the model's are."""
    weights = itertools.chain(model.parameters(), model.buffers())
    home = next((tensor.device for tensor in weights), None)

    def moved(leaf: Any) -> Any:
        return leaf.to(home) if isinstance(leaf, torch.Tensor) else leaf

    return dict(pytree.tree_map(moved, dict(call)))


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
