"""trace, calibrate and compile: the dataflow of the compiler, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

import torch

from wancompile.build import Options, build, prepare
from wancompile.compiled import CompiledModel
from wancompile.errors import InputError
from wancompile.experts.compiled import CompiledPipeline
from wancompile.experts.make import calibrate_pipeline, compile_pipeline
from wancompile.experts.pipe import Pipeline, is_pipeline
from wancompile.experts.play import PipelineData
from wancompile.gate.limits import DEFAULT, Limits
from wancompile.program import Program
from wancompile.quant.stats import Stats
from wancompile.recipe import Auto, Recipe, resolve
from wancompile.samples import CalibData
from wancompile.start import Started, device_of, named, need_weights, normalize, run


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
    return normalize(model, [named(model, example_inputs)], dynamic=dynamic, dump=dump)


@overload
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
) -> Stats: ...


@overload
def calibrate(
    model: Pipeline,
    calib_data: PipelineData,
    *,
    labels: int = 10,
    rows: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    total: int | None = None,
    progress: bool = False,
) -> dict[str, Stats]: ...


def calibrate(
    model: torch.nn.Module | Pipeline,
    calib_data: Any,
    *,
    labels: int = 10,
    rows: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    total: int | None = None,
    progress: bool = False,
) -> Stats | dict[str, Stats]:
    """Return the statistics of `model` on `calib_data`, to be saved, merged or compiled with.

    Args:
        model: a Wan transformer with real weights, or a pipeline, whose experts get statistics of
            their own, by name; it is left as it was.
        calib_data: as for `compile`; a `Sample` is a call that says its kind.
        labels: number of equal timestep ranges whose statistics are kept apart.
        rows: tokens sampled of each value that linears read.
        seed: draws the sample; runs to be merged need different seeds.
        device: where to run. Weights that are elsewhere come and go, a gigabyte at a time.
        checkpoint: a file that is written as calibration goes on, and when it is interrupted; for a
            pipeline one for each expert, `calib.transformer.st` where `calib.st` is given; it
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
    path = None if checkpoint is None else Path(checkpoint)
    where, observed = device_of(device), {"labels": labels, "rows": rows, "seed": seed}
    if is_pipeline(model):
        return calibrate_pipeline(
            model, calib_data, where, path, total=total, progress=progress, **observed
        )
    module, live = _module(model), callable(calib_data)
    need_weights(module)
    started = Started(module, where, path, None, gated=False, live=live, **observed)
    run(started, module, calib_data, total=total, progress=progress)
    return started.stats()


@overload
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
    total: int | None = None,
    progress: bool = False,
    dump: Path | None = None,
    share_rows: bool = True,
) -> CompiledModel: ...


@overload
def compile(
    model: Pipeline,
    calib_data: PipelineData | None = None,
    recipe: str | Recipe | Auto = "int8",
    *,
    stats: Mapping[str, Stats] | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    consume: bool = False,
    device: torch.device | str | None = None,
    limits: Limits | None = DEFAULT,
    checkpoint: str | Path | None = None,
    total: int | None = None,
    progress: bool = False,
    dump: Path | None = None,
    share_rows: bool = True,
) -> CompiledPipeline: ...


def compile(
    model: torch.nn.Module | Pipeline,
    calib_data: Any = None,
    recipe: str | Recipe | Auto = "int8",
    *,
    stats: Stats | Mapping[str, Stats] | None = None,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None = None,
    consume: bool = False,
    device: torch.device | str | None = None,
    limits: Limits | None = DEFAULT,
    checkpoint: str | Path | None = None,
    total: int | None = None,
    progress: bool = False,
    dump: Path | None = None,
    share_rows: bool = True,
) -> CompiledModel | CompiledPipeline:
    """Return `model` calibrated, smoothed, quantized, and compared with what it was.

    Of `calib_data` every ninth call from the fourth on, four at most, is kept from calibration,
    later ones in the place of others where they lie deeper in the schedule, and of a short schedule
    one of its last step; on them the result is compared with the original. Of fewer than four calls
    none can be spared: then the first is compared, and without data the example. What is beyond its
    limit falls back to higher precision, as the report says.

    Of a pipeline every part that denoises, its experts, is compiled on the calls that reach it, and
    put into its place when all have succeeded. One run of the data serves all experts, each call in
    float, so that later steps are those of the original; then they are compiled one by one.

    Args:
        model: a Wan transformer with real weights, or a diffusers pipeline. It is left as it was,
            also when an error is raised, unless `consume` is set and everything has succeeded up to
            quantization (of a pipeline's first expert); a pipeline gets its compiled experts.
        calib_data: calls of `model.forward`, each a dict of named or a tuple of positional
            arguments, or a `Sample` of one, shapes may differ; or a callable that runs the model,
            such as a whole pipeline call. For a pipeline: a callable; or prompts or dicts of its
            arguments, for runs up to the latents, the i-th from noise of seed i where it brings
            neither latents nor a generator; or calls of each expert by name.
        recipe: one of `RECIPES` by name ("int8", "fp8", "int8-attention", "int8-attention-fast",
            "fp8-attention"), a `Recipe`, or a budget for one, as `Recipe.auto` makes it: then each
            site gets a type that suits it, by the errors measured on the call kept that errs most,
            which takes half a forward a site and type.
        stats: statistics of an earlier `calibrate`, instead of `calib_data`.
        example_inputs: one call that shows the shapes, needed where `calib_data` is not given; for
            a pipeline one by each expert's name.
        consume: let go of each original weight once it is quantized, so that host memory never
            holds both; `model` is on the meta device afterwards, also where the result is too far
            from it. Groups still fall back for errors of their own, for those are known before.
        device: where calibration, the search for smooth scales and rounding compute. Weights that
            are elsewhere come and go, a gigabyte at a time, of one expert after the other; a
            pipeline's other parts compute where they are. The result is where `model` was.
        limits: what the result is held to; None compares nothing.
        checkpoint: a file for calibration to go on from, as for `calibrate`. Calls that are kept
            from calibration are not in it and run again, so one that `calibrate` made is refused.
        total: the number of calls to expect, for the time left in the progress bar, as for
            `calibrate`; runs of a pipeline on prompts estimate it themselves.
        progress: show progress bars.
        dump: a folder for the text of every level and the diff of every pass, and for a pipeline a
            folder in it for each expert.
        share_rows: read rows of a modulation that repeat, as those of a timestep per token do, from
            one place; False reads each where it is. No bit of the output depends on it.

    Returns:
        A drop-in for `model` with a `report`; of a pipeline the experts, with one, to be saved or
        attached to others. Tensors that stay in floating point are shared with `model`, not copied.

    Raises:
        GateError: the result is too far from `model`, whatever fell back.
        PipelineError: the pipeline has nothing to compile, or cannot run as it is.
        WancompileError: with the site, the source line, the pass and the reason; see `errors`.
    """
    options = Options(
        recipe=recipe if isinstance(recipe, Auto) else resolve(recipe),
        consume=consume,
        device=device_of(device),
        limits=limits,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        total=total,
        progress=progress,
        dump=dump,
        share_rows=share_rows,
    )
    if is_pipeline(model):
        return compile_pipeline(
            model, calib_data, cast(Any, stats), cast(Any, example_inputs), options
        )
    module = _module(model)
    prepared = prepare(module, calib_data, cast(Stats | None, stats), example_inputs, options)
    return build(module, prepared, options)


def _module(model: object) -> torch.nn.Module:
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"a {type(model).__name__} is neither a model nor a pipeline, which has components"
        )
    return model
