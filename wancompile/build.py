"""From a NORMAL program and its statistics to a compiled model."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import torch

from wancompile import passes, pipeline
from wancompile.auto import choose_recipe
from wancompile.compiled import CompiledModel
from wancompile.cost import Costs, costs
from wancompile.digest import of_state
from wancompile.errors import CalibrationError, InputError
from wancompile.gate.limits import Limits
from wancompile.gate.rounds import Rounds
from wancompile.ir import match
from wancompile.program import Program
from wancompile.quant.stability import Stability
from wancompile.quant.stats import Stats
from wancompile.recipe import Auto, Recipe
from wancompile.report import Report
from wancompile.samples import CalibData
from wancompile.start import Prepared, Started, from_example, need_weights, run
from wancompile.times import Predicted, predict


@dataclass(frozen=True)
class Options:
    """How a model is compiled; each as `wancompile.compile` describes it.

    `expert` is the name that the model has in a pipeline, empty where it is none's.
    """

    recipe: Recipe | Auto
    consume: bool
    device: torch.device | None
    limits: Limits | None
    checkpoint: Path | None
    progress: bool
    dump: Path | None
    expert: str = ""
    total: int | None = None
    share_rows: bool = True

    @property
    def gated(self) -> bool:
        """Whether the original's outputs on some calls are kept, to compare with."""
        return self.limits is not None or isinstance(self.recipe, Auto)


def prepare(
    model: torch.nn.Module,
    calib_data: CalibData | None,
    stats: Stats | None,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None,
    options: Options,
) -> Prepared:
    """Return what `build` needs, from whatever of data, statistics and an example there is.

    Raises:
        WancompileError: as `wancompile.compile` does.
    """
    if stats is None and calib_data is None:
        _can_do_without_data(options.recipe)
    need_weights(model)
    if calib_data is None:
        if options.checkpoint is not None:
            raise InputError("a checkpoint is one of calibration, which needs calib_data")
        device, dump, gated = options.device, options.dump, options.gated
        return from_example(model, stats, example_inputs, device, dump, gated=gated)
    if stats is not None:
        raise InputError("give calib_data or stats, not both")
    started = begun(model, options, live=callable(calib_data))
    run(started, model, calib_data, total=options.total, progress=options.progress)
    return started.prepared()


def begun(model: torch.nn.Module, options: Options, *, live: bool) -> Started:
    """Return the calibration of `model` that compiling with `options` needs."""
    device, checkpoint, dump = options.device, options.checkpoint, options.dump
    return Started(model, device, checkpoint, dump, gated=options.gated, live=live)


def _can_do_without_data(asked: Recipe | Auto) -> None:
    if isinstance(asked, Auto):
        raise CalibrationError("a budget needs calibration data or statistics to choose types by")
    if asked.rounds_attention:
        raise CalibrationError(
            "8-bit attention needs calibration data or statistics for its static scales"
        )
    if asked.scales_inputs:
        raise CalibrationError(
            "static scales of activations need calibration data or statistics to take them from"
        )


def build(model: torch.nn.Module, prepared: Prepared, options: Options) -> CompiledModel:
    """Smooth, quantize and fuse what was prepared, and compare it with what it was.

    With `options.consume` the weights of `model` and of the program in `prepared` are let go.

    Raises:
        WancompileError: as `wancompile.compile` does.
    """
    program, stats, evidence = prepared.program, prepared.stats, prepared.evidence
    notes = _notes(program, stats, options.expert)
    for note in notes:
        warnings.warn(note, stacklevel=3)
    chosen, choice, where = options.recipe, None, options.device
    if isinstance(chosen, Auto):
        choice = choose_recipe(
            chosen, program, evidence, stats, device=where, progress=options.progress
        )
        chosen = choice.recipe
    chosen.check(program.groups, program.attentions)
    gc.collect()  # the observed program is tied in cycles, and as large as the statistics
    bytes_before, times = program.nbytes, _costs(program)
    probe = pipeline.Probe(prepared.call, where)
    rounds = Rounds(chosen, stats, options.limits, evidence, probe, where, options.dump)
    smoothed = rounds.smooth(program)
    if options.consume:
        if smoothed is not program:  # as it is where nothing is to be smoothed
            program.release()
        model.to("meta")
        gc.collect()  # what came before `program` is tied in cycles, and shares its weights
    quantized = rounds.quantize(program, smoothed, consume=options.consume)
    fusion = passes.fusion(share_rows=options.share_rows)
    fused = pipeline.run(quantized, fusion, dump=options.dump, consume=True)
    gate = rounds.finish(fused)
    report = Report(
        rounds.recipe,
        (),
        (),
        (),
        bytes_before,
        0,
        choice,
        gate,
        stability=_stability(stats),
        predicted=None if times is None else _predicted(times, rounds.recipe, program, fused),
        notes=notes,
    ).with_program(fused)
    config = getattr(model, "config", None)
    return CompiledModel(fused, report, config, _dtype_of(model), evidence)


def _notes(program: Program, stats: Stats | None, expert: str) -> tuple[str, ...]:
    """Return what speaks against the statistics, though they fit the sites of the model.

    Nothing in them looks wrong where only weights differ: scales are then those of other values.
    """
    if stats is None or not stats.model or stats.model == of_state(program.state):
        return ()
    name = f"the expert {expert}" if expert else "this model"
    return (
        f"the statistics are of other weights than those of {name}: of another expert, another "
        "checkpoint, or the same in another type. A fine-tune may do with those of its base, and "
        "`check` on calls tells the error; else give calib_data, or statistics of its own",
    )


def _costs(program: Program) -> Costs | None:
    """Return what the sites of a NORMAL program cost, None where nothing like it was measured."""
    attentions = [node for node in program.graph.nodes if match.is_attention(node)]
    if any(match.rank(node) != 4 for node in attentions):
        return None
    try:
        return costs(program)
    except InputError:
        return None


def _predicted(times: Costs, recipe: Recipe, program: Program, fused: Program) -> Predicted:
    """Predict the times of the parts; attentions that the passes left alone are in float."""
    left = {match.site(node) for node in fused.graph.nodes if match.is_attention(node)}
    sites = (str(one.site) for one in program.attentions if one.site in left)
    return predict(times, recipe.with_float_attention(map(escape, sites)), program.groups)


def _stability(stats: Stats | None) -> Stability | None:
    """Return how far scales moved between halves of the calibration; None where it had none."""
    try:
        return None if stats is None else stats.stability()
    except CalibrationError:
        return None


def _dtype_of(model: torch.nn.Module) -> torch.dtype:
    """Return the type that a pipeline should cast inputs to: that of most weights."""
    dtype = getattr(model, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
