"""Prompts, and arguments of a pipeline, as runs of it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from wancompile.errors import CalibrationError, InputError, PipelineError
from wancompile.experts.pipe import Pipeline, boundary_of, denoisers, told_boundary
from wancompile.samples import CalibData

PipelineData = Callable[[], Any] | Iterable[str | Mapping[str, Any]] | Mapping[str, CalibData]
"""What a pipeline is calibrated on: see `wancompile.compile`."""

Play = Callable[["tqdm[Any]"], None]
"""Runs the pipeline; it may tell the bar how many calls are to come."""


def player(pipe: Pipeline, data: PipelineData) -> Play:
    """Return what plays `data`, all of it checked against what the pipeline takes.

    Raises:
        InputError: a sample is neither a prompt nor arguments of the pipeline.
        CalibrationError: there is no sample.
        PipelineError: the pipeline could not run, for it has one expert where it needs two.
    """
    if callable(data):
        return lambda bar: _ignored(data())
    if isinstance(data, (str, Mapping)):
        raise InputError(
            "calibration data of a pipeline is a callable, a list of prompts or of dicts of its "
            "arguments, or calls by the name of an expert; put one prompt or dict into a list"
        )
    _need_both(pipe)
    known = _parameters(pipe)
    samples = [_arguments(index, one, known) for index, one in enumerate(data)]
    if not samples:
        raise CalibrationError("calibration data is empty", pass_name="calibrate")
    return lambda bar: _play(pipe, samples, bar)


def _ignored(result: object) -> None:
    del result


def _need_both(pipe: Pipeline) -> None:
    found = denoisers(pipe)
    if boundary_of(pipe) is not None and len(found) < 2:
        raise PipelineError(
            f"{told_boundary(pipe)}, but it has only {', '.join(found)}: load the other one, too"
        )


def _parameters(pipe: Pipeline) -> tuple[str, ...]:
    return tuple(inspect.signature(pipe.__call__).parameters)


def _arguments(
    index: int, sample: str | Mapping[str, Any], known: tuple[str, ...]
) -> dict[str, Any]:
    """Return the arguments of one run: up to the latents, and from noise of its own seed."""
    if isinstance(sample, str):
        sample = {"prompt": sample}
    if not isinstance(sample, Mapping):
        raise InputError(
            f"calibration sample {index} is a {type(sample).__name__}: give a prompt, or a dict of "
            "arguments of the pipeline"
        )
    unknown = next((name for name in sample if name not in known), None)
    if unknown is not None:
        near = difflib.get_close_matches(str(unknown), known) or known
        raise InputError(
            f"calibration sample {index}: the pipeline takes no {unknown!r}, but {', '.join(near)}"
        )
    found = dict(sample)
    if "output_type" in known:
        found.setdefault("output_type", "latent")
    if "generator" in known and "latents" not in found:
        found.setdefault("generator", torch.Generator().manual_seed(index))
    return found


def _play(pipe: Pipeline, samples: list[dict[str, Any]], bar: tqdm[Any]) -> None:
    is_told = bar.total is not None
    with _quiet(pipe):
        for index, sample in enumerate(samples, start=1):
            pipe(**sample)
            if not is_told:
                bar.total = round(bar.n * len(samples) / index)


@contextmanager
def _quiet(pipe: Pipeline) -> Iterator[None]:
    """Hide the bar of each video behind the one of calibration."""
    configure: Any = getattr(pipe, "set_progress_bar_config", None)
    if configure is None:
        yield
        return
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    configure(**{**before, "disable": True})
    try:
        yield
    finally:
        configure(**before)
