"""compile and calibrate for pipelines.

All experts are prepared in one run of the data, and built one after the other. Where a device is
given, each expert's weights come and go while it computes, in calibration and later, so that the
device never holds both; a second run, with one expert at a time, would only take its time again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wancompile.build import Options, begun, build, prepare
from wancompile.errors import CalibrationError, InputError, of_expert
from wancompile.experts.compiled import CompiledPipeline
from wancompile.experts.facts import Calibrated
from wancompile.experts.listen import listen
from wancompile.experts.pipe import Pipeline, boundary_of, experts_of
from wancompile.experts.play import PipelineData, Play, player
from wancompile.quant.stats import Stats
from wancompile.samples import CalibData
from wancompile.start import Prepared, Started, need_weights, run

Experts = Mapping[str, torch.nn.Module]


def compile_pipeline(
    pipe: Pipeline,
    data: PipelineData | None,
    stats: Mapping[str, Stats] | None,
    examples: Mapping[str, Any] | None,
    options: Options,
) -> CompiledPipeline:
    """Compile every expert of `pipe` and put the results in their places.

    Until all have succeeded, `pipe` is as it was.

    Raises:
        PipelineError: there is nothing to compile in it.
        WancompileError: as `wancompile.compile`, with the expert's name.
    """
    experts = experts_of(pipe)
    prepared = _prepare(pipe, experts, data, stats, examples, options)
    calibrated = {name: Calibrated.of(one.stats) for name, one in prepared.items()}
    built = {}
    for name, model in experts.items():
        with of_expert(name):
            built[name] = build(model, prepared.pop(name), _of(name, options))
    compiled = CompiledPipeline(built, calibrated, boundary_of(pipe))
    compiled.attach(pipe)
    return compiled


def calibrate_pipeline(
    pipe: Pipeline,
    data: PipelineData,
    device: torch.device | None,
    checkpoint: Path | None,
    *,
    total: int | None,
    progress: bool,
    **options: int,
) -> dict[str, Stats]:
    """Return the statistics of every expert of `pipe`; see `wancompile.calibrate`."""
    experts = experts_of(pipe)
    by_name = _by_expert(experts, data)
    started = {}
    for name, model in experts.items():
        with of_expert(name):
            need_weights(model)
        live, path = by_name is None or callable(by_name[name]), _file(name, checkpoint)
        started[name] = Started(model, device, path, None, gated=False, live=live, **options)
    if by_name is None:
        listen(pipe, experts, started, player(pipe, data), total=total, progress=progress)
    else:
        for name, model in experts.items():
            with of_expert(name):
                run(started[name], model, by_name[name], progress=progress)
    found = {}
    for name, one in started.items():
        with of_expert(name):
            found[name] = one.stats()
    return found


def _prepare(
    pipe: Pipeline,
    experts: Experts,
    data: PipelineData | None,
    stats: Mapping[str, Stats] | None,
    examples: Mapping[str, Any] | None,
    options: Options,
) -> dict[str, Prepared]:
    by_name = _by_expert(experts, data)
    if data is not None and by_name is None:
        if stats is not None:
            raise InputError("give calib_data or stats, not both")
        return _heard(pipe, experts, player(pipe, data), options)
    known = _of_all("statistics", experts, stats)
    shown = _of_all("example inputs", experts, examples)
    found = {}
    for name, model in experts.items():
        calls = None if by_name is None else by_name[name]
        with of_expert(name):
            found[name] = prepare(model, calls, known[name], shown[name], _of(name, options))
    return found


def _heard(pipe: Pipeline, experts: Experts, play: Play, options: Options) -> dict[str, Prepared]:
    started = {}
    for name, model in experts.items():
        with of_expert(name):
            need_weights(model)
        started[name] = begun(model, _of(name, options), live=True)
    listen(pipe, experts, started, play, total=options.total, progress=options.progress)
    found = {}
    for name, one in started.items():
        with of_expert(name):
            found[name] = one.prepared()
    return found


def _by_expert(experts: Experts, data: PipelineData | None) -> Mapping[str, CalibData] | None:
    """Return `data` if it is calls by the name of an expert.

    Raises:
        CalibrationError: some experts have calls and another has none.
    """
    if not isinstance(data, Mapping) or not data.keys() & experts.keys():
        return None
    unknown = next((name for name in data if name not in experts), None)
    if unknown is not None:
        raise InputError(f"the pipeline has no expert {unknown!r}, but {', '.join(experts)}")
    missing = next((name for name in experts if name not in data), None)
    if missing is not None:
        raise CalibrationError(
            f"there are no calls for the expert {missing}", pass_name="calibrate"
        )
    return data


def _of_all(what: str, experts: Experts, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what is given for each expert, None for all if nothing is."""
    if given is None:
        return dict.fromkeys(experts)
    if not isinstance(given, Mapping) or given.keys() != experts.keys():
        raise InputError(
            f"{what} of a pipeline are a dict with one entry for each of {', '.join(experts)}"
        )
    return dict(given)


def _of(name: str, options: Options) -> Options:
    """Return the options of one expert: its name, files and dumps of its own."""
    dump = None if options.dump is None else options.dump / name
    checkpoint = _file(name, options.checkpoint)
    return replace(options, checkpoint=checkpoint, dump=dump, total=None, expert=name)


def _file(name: str, path: Path | None) -> Path | None:
    """Return the checkpoint of one expert: `calib.st` becomes `calib.transformer.st`."""
    return None if path is None else path.with_name(f"{path.stem}.{name}{path.suffix}")
