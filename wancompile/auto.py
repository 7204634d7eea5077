"""Choosing a type for every site: the fastest within an error, or the most exact within a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from wancompile.candidates import Candidates, Point
from wancompile.cost import FLOAT, costs
from wancompile.errors import CalibrationError, RecipeError
from wancompile.gate.evidence import Evidence
from wancompile.gate.record import on_device
from wancompile.program import Program
from wancompile.quant.stats import Stats
from wancompile.recipe import RECIPES, Auto, Recipe
from wancompile.sensitivity import HeldOut, Sensitivity, everything_in, measure
from wancompile.stream import is_same
from wancompile.units import plural

# How many choices are measured at most, and how many limits are tried, which costs next to nothing.
_ROUNDS, _STEPS = 4, 24


@dataclass(frozen=True)
class Choice:
    """What became of a request, and why.

    `predicted` is of the recipe chosen, `measured` its error on the held-out call that errs most,
    with weights rounded as they will be; predictions are for weights rounded to nearest.
    `frontier` runs from floating point to the fastest, `uniform` are the recipes that put
    everything in one type, where all of it may be; `compiled_ms` is torch.compile in bf16. Times
    are of one call of `tokens` video tokens, the part of the model that is no block left out.

    `calls` are held out, at `timesteps` from the smallest to the largest; calibration saw those
    from the smallest to the largest of `calibrated`. None is unknown, or a model without.
    """

    request: Auto
    recipe: Recipe
    predicted: Point
    measured: float
    frontier: tuple[Point, ...]
    uniform: tuple[Point, ...]
    compiled_ms: float
    tokens: int
    source: str
    sensitivity: Sensitivity
    calls: int = 1
    timesteps: tuple[float, float] | None = None
    calibrated: tuple[float, float] | None = None

    @property
    def covered(self) -> str:
        """One sentence: what the error was measured on, and what nothing measured."""
        return _covered(self)

    def __str__(self) -> str:
        types = self.recipe.name
        lines = [
            f"{types}: {self.predicted.ms:.4g} ms, error {_percent(self.measured)} measured, "
            f"{_percent(self.predicted.error)} predicted, at {self.tokens} tokens",
            *(f"{one.name}: {one.ms:.4g} ms, error {_percent(one.error)}" for one in self.uniform),
            f"torch.compile in bf16: {self.compiled_ms:.4g} ms",
            f"times from {self.source}",
            self.covered,
        ]
        return "\n".join([*lines, "", str(self.sensitivity)])


def resolve(
    request: Auto,
    held_out: HeldOut,
    *,
    sensitivity: Sensitivity | None = None,
    progress: bool = False,
) -> Choice:
    """Return the recipe that `request` asks for, for the program and the calls of `held_out`.

    `sensitivity` is what was measured for an earlier request, so that it need not be again.

    With `max_error` the time is least among choices whose error, measured on every call with
    everything rounded together by GPTQ, is within it: errors add up like squares only nearly, and
    those of single sites are of weights rounded to nearest, on the one call that errs most, so the
    budget of squares is corrected by what is measured, at most four times. With `max_ms` the sum
    of squares is least.

    Raises:
        RecipeError: no choice is as fast, or as exact in that time, as was asked; the message says
            what can be reached.
        InputError: nothing was measured on that device.
        WancompileError: as `sensitivity` does.
    """
    times = costs(held_out.program, tokens=request.tokens, device=request.device)
    found = sensitivity or measure(_hardest(request, held_out), request.types, progress=progress)
    candidates = Candidates(request, times, found, held_out.program.groups)
    recipe, error = (
        _fastest(candidates, held_out, request.max_error)
        if request.max_ms is None and request.max_error is not None
        else _most_exact(candidates, held_out, request)
    )
    uniform = map(candidates.point, _uniform(request))
    return Choice(
        request=request,
        recipe=recipe,
        predicted=candidates.point(recipe),
        measured=error,
        frontier=candidates.frontier(),
        uniform=tuple(one for one in uniform if math.isfinite(one.error)),
        compiled_ms=times.compiled,
        tokens=times.tokens,
        source=times.source,
        sensitivity=found,
        calls=len(held_out.calls),
        timesteps=held_out.timesteps,
        calibrated=held_out.calibrated,
    )


def choose_recipe(
    request: Auto,
    program: Program,
    evidence: Evidence | None,
    stats: Stats | None,
    *,
    device: torch.device | None = None,
    progress: bool = False,
) -> Choice:
    """Resolve a request on the calls of the evidence.

    Args:
        request: what is asked for.
        program: the original, at level NORMAL.
        evidence: calls to measure errors on.
        stats: what was learned on other calls.
        device: where to compute, if not where the weights are; all of them move there.
        progress: show a progress bar.

    Raises:
        CalibrationError: there is no evidence.
        WancompileError: as `resolve` does.
    """
    if evidence is None:
        raise CalibrationError("a budget needs calls to measure errors on")
    home = device or program.device
    placed = program if is_same(home, program.device) else program.to(home)
    calls = [on_device(call, home) for call in evidence.calls]
    return resolve(request, HeldOut.of(placed, calls, stats), progress=progress)


def _hardest(request: Auto, held_out: HeldOut) -> HeldOut:
    """Return the call to tell sites apart on: which errs most hardly depends on the recipe."""
    return held_out.hardest(everything_in(request.types[0])[0])


def _fastest(candidates: Candidates, held_out: HeldOut, budget: float) -> tuple[Recipe, float]:
    """Return the fastest choice found whose measured error is within `budget`, and that error.

    The limit of the predicted error is searched for: one of choices within the budget is too low,
    one of choices beyond it too high, and the ratio of measured to predicted says where to look.
    Where that leads to a choice already measured, it is between the two.
    """
    best = candidates.recipe(candidates.within_error(0.0))
    measured = {best: 0.0}
    low, limit, high = 0.0, budget, 2 * budget
    for _ in range(_STEPS):
        recipe = candidates.recipe(candidates.within_error(limit))
        is_new = recipe not in measured
        if is_new:
            if len(measured) > _ROUNDS:
                break
            measured[recipe] = max(held_out.errors_of(recipe))
        error = measured[recipe]
        if error <= budget:
            low = limit
            best = min(best, recipe, key=lambda one: candidates.point(one).ms)
        else:
            high = limit
        limit *= budget / error if error > 0 else 2.0
        if not is_new or not low < limit < high:
            limit = (low + high) / 2
    return best, measured[best]


def _most_exact(candidates: Candidates, held_out: HeldOut, request: Auto) -> tuple[Recipe, float]:
    assert request.max_ms is not None
    chosen = candidates.within_ms(request.max_ms)
    if chosen is None:
        fastest = candidates.frontier()[-1]
        raise RecipeError(
            f"no choice takes {request.max_ms:g} ms or less at {candidates.times.tokens} tokens: "
            f"the fastest takes {fastest.ms:.4g} ms, at an error of {_percent(fastest.error)}"
        )
    recipe = candidates.recipe(chosen)
    error = max(held_out.errors_of(recipe))
    if request.max_error is not None and error > request.max_error:
        raise RecipeError(
            f"no choice within {request.max_ms:g} ms has an error of "
            f"{_percent(request.max_error)} or less: the most exact has {_percent(error)}"
        )
    return recipe, error


def _uniform(request: Auto) -> list[Recipe]:
    named = [
        one
        for one in RECIPES.values()
        if one.linears is not None
        and one.linears.dtype in request.types
        and (request.attention or one.attention is None)
    ]
    return [Recipe(FLOAT, None), *named]


def _covered(choice: Choice) -> str:
    calls = plural(choice.calls, "held-out call")
    if choice.timesteps is None:
        return f"error of the worst of {calls}"
    text = f"error of the worst of {calls} at timesteps {_down(choice.timesteps)}"
    low, high = choice.calibrated or choice.timesteps
    if low < choice.timesteps[0] or high > choice.timesteps[1]:
        text += f", of {_down((low, high))} that calibration saw"
    return f"{text}; steps beyond may err more: calibrate with those that you will sample with"


def _down(timesteps: tuple[float, float]) -> str:
    """Return timesteps in the order of denoising."""
    return " to ".join(dict.fromkeys(f"{one:.4g}" for one in reversed(timesteps)))


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
