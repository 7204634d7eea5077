"""One run of a pipeline, heard by all of its experts at once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from tqdm import tqdm

from wancompile.errors import CalibrationError
from wancompile.experts.pipe import Pipeline, told_boundary
from wancompile.experts.play import Play
from wancompile.samples import Ears
from wancompile.start import Started


def listen(
    pipe: Pipeline,
    experts: Mapping[str, torch.nn.Module],
    started: Mapping[str, Started],
    play: Play,
    *,
    total: int | None,
    progress: bool,
) -> None:
    """Play once, and let each expert's calibration observe the calls that reach the expert.

    Every call is computed in float by the program that is observed, so that the trajectory is the
    original's. What was learned is kept in the checkpoints, also when this is interrupted.

    Raises:
        CalibrationError: an expert got no call.
        WancompileError: as `Ears` and `Started`, with the expert's name.
    """
    ears = {}
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=total, desc="calibrate", disable=not progress, unit="call")
        )
        for name, model in experts.items():
            stack.callback(started[name].keep)
            ears[name] = Ears(model, started[name], bar, expert=name)
            ears[name].put_on()
            stack.callback(ears[name].take_off)
        play(bar)
    silent = [name for name, one in ears.items() if not one.heard]
    if len(silent) == len(ears):
        raise CalibrationError(
            "calibration data is empty: the pipeline's experts were never run",
            pass_name="calibrate",
        )
    for name in silent:
        raise CalibrationError(_told(pipe, name, started, silent), pass_name="calibrate")


def _told(pipe: Pipeline, name: str, started: Mapping[str, Started], silent: list[str]) -> str:
    spans = [
        f"{other} had timesteps {steps[1]:g} to {steps[0]:g}"
        for other, one in started.items()
        if other not in silent and (steps := one.stats().timesteps) is not None
    ]
    seen = "".join(f", and {span}" for span in spans)
    return (
        f"the expert {name} got no call: {told_boundary(pipe)}{seen}; calibrate with steps on both "
        f"sides of the boundary, or take {name} out of the pipeline"
    )
