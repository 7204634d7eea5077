"""The error that each site causes at the end of the model, one site at a time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm import tqdm

from wancompile import passes, pipeline
from wancompile.errors import CalibrationError, InputError, LevelError, NumericsError
from wancompile.ir.levels import Level
from wancompile.ir.site import Role
from wancompile.program import Program
from wancompile.quant.stats import Stats
from wancompile.recipe import ATTENTIONS, DTYPES, LINEARS, QSpec, Recipe, Rule
from wancompile.trials import SELF_ATTENTION, Branches, Trial, squares, trials


@dataclass(frozen=True)
class SiteSensitivity:
    """What happens if one group or self-attention rounds to `dtype` and nothing else does.

    `site` is the key of the group or the site of the attention, `dtype` of a group a name in
    `LINEARS`, of an attention one in `ATTENTIONS`. Errors are relative L2 over all calls: `local`
    of the site's own outputs, `error` of the model's. `calibrated` is the error that the search for
    a smooth scale has found on sampled tokens, None where there was no search.
    """

    site: str
    role: str
    dtype: str
    local: float
    error: float
    calibrated: float | None = None


@dataclass(frozen=True)
class Together:
    """All sites at once, attention as `dtype`, linears in its type: error, and root of squares.

    `error` is measured, `predicted` the root of the sum of the squares of what each site causes.
    """

    dtype: str
    error: float
    predicted: float


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivities of all sites in all types, in the order of execution.

    `forwards` is the work of finding them, in forwards of the float program; `seconds` the time.
    """

    sites: tuple[SiteSensitivity, ...]
    together: tuple[Together, ...]
    calls: int
    forwards: float
    seconds: float

    def error(self, site: str, dtype: str) -> float:
        """Return the end-to-end error of one site in one type; 0 in floating point.

        Raises:
            KeyError: it was not measured.
        """
        if dtype not in (*LINEARS, *ATTENTIONS):
            return 0.0
        found = (one.error for one in self.sites if (one.site, one.dtype) == (site, dtype))
        error = next(found, None)
        if error is None:
            raise KeyError(f"{site} in {dtype}")
        return error

    def worst(self, limit: int | None = None) -> tuple[SiteSensitivity, ...]:
        """Return the largest end-to-end errors, worst first."""
        return tuple(sorted(self.sites, key=lambda one: -one.error)[:limit])

    def to_json(self) -> str:
        """Return the sensitivities as JSON."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """Return what `to_json` wrote.

        Raises:
            InputError: the text is anything else.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            sites = tuple(SiteSensitivity(**one) for one in data["sites"])
            together = tuple(Together(**one) for one in data["together"])
            return cls(**{**data, "sites": sites, "together": together})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"these are no sensitivities: {error}") from error

    def __str__(self) -> str:
        return table(self)


def sensitivity(
    program: Program,
    calls: Iterable[Mapping[str, Any]],
    stats: Stats | None,
    *,
    options: Sequence[str] = tuple(DTYPES),
    smooth: bool = True,
    progress: bool = False,
) -> Sensitivity:
    """Round one site at a time and measure the error of the model's output.

    With `n` sites and types on `c` calls this takes about `c * (n / 2 + 2)` forwards of the float
    program: trials branch off one run of it, so that each computes what comes after its site. Two
    sets of activations are in memory. Fewer tokens than a video has serve as well. Weights are
    rounded to nearest, whatever the recipe would do.

    Args:
        program: at level NORMAL, with real weights, as `trace` returns it.
        calls: named arguments of calls that nothing was calibrated on.
        stats: statistics to smooth by, and for the scales of attention; without them nothing is
            smoothed, and attention is left out.
        options: 8-bit types to try, some of `LINEARS`.
        smooth: whether groups are smoothed, each for the type it is tried in.
        progress: show a progress bar.

    Raises:
        LevelError: the program is at another level.
        InputError: a call does not fit.
        RecipeError: a type is unknown.
        CalibrationError: there is no call, or the statistics are of another model.
        NumericsError: the program's own output holds NaN or infinity.
    """
    return measure(HeldOut.of(program, calls, stats), options, smooth=smooth, progress=progress)


def measure(
    held_out: HeldOut, options: Sequence[str], *, smooth: bool = True, progress: bool = False
) -> Sensitivity:
    """Do what `sensitivity` does on calls whose exact outputs are known."""
    started, before = time.perf_counter(), held_out.forwards - len(held_out.calls)
    sites: list[SiteSensitivity] = []
    together: list[Together] = []
    with tqdm(desc="sensitivity", unit="trial", disable=not progress) as bar:
        for dtype in options:
            recipes = everything_in(dtype, smooth)
            found = held_out.one_by_one(recipes, bar)
            sites += found
            for one in recipes:
                predicted = root_of_squares(each.error for each in _rounded_by(one, found))
                together.append(Together(one.name, held_out.error_of(one), predicted))
    return Sensitivity(
        sites=tuple(sites),
        together=tuple(together),
        calls=len(held_out.calls),
        forwards=held_out.forwards - before,
        seconds=time.perf_counter() - started,
    )


def everything_in(dtype: str, smooth: bool = True) -> tuple[Recipe, ...]:
    """Return the recipes that round all linears and self-attentions to one type.

    There is one for each entry of `ATTENTIONS` with q and k in that type, and of its name. Of a
    type with static scales there is one, for the linears behind an activation alone.

    Raises:
        RecipeError: the type is unknown.
    """
    if dtype in LINEARS and LINEARS[dtype].activation == "static":
        spec = replace(LINEARS[dtype], smooth=smooth)
        return (Recipe(dtype, None, (Rule(str(Role.FFN_DOWN), spec),)),)
    linears = QSpec(dtype, smooth)
    return tuple(
        Recipe(name, linears, attention=spec)
        for name, spec in ATTENTIONS.items()
        if spec.dtype == dtype
    )


def _rounded_by(recipe: Recipe, found: Iterable[SiteSensitivity]) -> list[SiteSensitivity]:
    """Return those of `found` that are in the type that `recipe`, one for everything, gives."""
    linears = recipe.name if recipe.linears is None else recipe.linears.name
    return [
        one
        for one in found
        if one.dtype == (recipe.name if one.role == SELF_ATTENTION else linears)
    ]


class HeldOut:
    """A float program, calls that nothing was calibrated on, and its own outputs on them.

    Attributes:
        forwards: the work done so far, in forwards of the program.
    """

    def __init__(
        self,
        program: Program,
        calls: Sequence[Mapping[str, Any]],
        stats: Stats | None,
        expected: Sequence[Sequence[Tensor]],
    ) -> None:
        self.program = program
        self.calls = calls
        self.forwards = float(len(calls))
        self._stats = stats
        self._expected = expected

    @classmethod
    def of(
        cls, program: Program, calls: Iterable[Mapping[str, Any]], stats: Stats | None
    ) -> HeldOut:
        """Run the program on each call; errors as in `sensitivity`."""
        if program.level is not Level.NORMAL:
            raise LevelError(f"sensitivity needs NORMAL, the program is at {program.level.name}")
        given = [dict(call) for call in calls]
        if not given:
            raise CalibrationError("there is no call to measure errors on")
        expected = [_tensors(program(**call)) for call in given]
        for index, one in enumerate(expected):
            if not all(bool(torch.isfinite(tensor).all()) for tensor in one):
                raise NumericsError(f"the model's own output on call {index} holds NaN or infinity")
        return cls(program, given, stats, expected)

    @property
    def timesteps(self) -> tuple[float, float] | None:
        """The smallest and the largest timestep of the calls; None where the model has none."""
        found = (self.program.signature.timestep(call) for call in self.calls)
        known = [one for one in found if one is not None]
        return (min(known), max(known)) if known else None

    @property
    def calibrated(self) -> tuple[float, float] | None:
        """The smallest and the largest timestep of calibration; None where that is not known."""
        return None if self._stats is None else self._stats.timesteps

    def error_of(self, recipe: Recipe) -> float:
        """Return the relative L2 error of the model's output under `recipe`, over all calls."""
        return _relative(self._lost(recipe))

    def errors_of(self, recipe: Recipe) -> list[float]:
        """Return the relative L2 error of the model's output under `recipe` on each call."""
        return [_relative([one]) for one in self._lost(recipe)]

    def hardest(self, recipe: Recipe) -> HeldOut:
        """Return these with only the call on which `recipe` errs most."""
        if len(self.calls) == 1:
            return self
        errors = self.errors_of(recipe)
        most = errors.index(max(errors))
        return HeldOut(self.program, [self.calls[most]], self._stats, [self._expected[most]])

    def one_by_one(self, recipes: Sequence[Recipe], bar: tqdm[Any]) -> list[SiteSensitivity]:
        """Return what each site that `recipes` round does alone; they differ in attention only."""
        smoothed = self._smoothed(recipes[0])
        every = (one for recipe in recipes for one in trials(smoothed, recipe, self._stats))
        chosen = list({(one.site, one.dtype): one for one in every}.values())
        bar.reset((bar.total or 0) + len(chosen) * len(self.calls))
        branches = Branches(smoothed, chosen)
        local: dict[Trial, list[tuple[float, float]]] = {one: [] for one in chosen}
        final: dict[Trial, list[tuple[float, float]]] = {one: [] for one in chosen}
        for call, exact in zip(self.calls, self._expected, strict=True):
            for outcome in branches.outcomes(call, exact):
                local[outcome.trial].append(outcome.local)
                final[outcome.trial].append(outcome.final)
                bar.update()
        self.forwards += branches.executed / len(self.program.graph.nodes)
        searched = {group.key: group.smoothing for group in smoothed.groups}
        return [
            SiteSensitivity(
                site=str(one.site),
                role=one.role,
                dtype=one.dtype,
                local=_relative(local[one]),
                error=_relative(final[one]),
                calibrated=smoothing.error if (smoothing := searched.get(one.site)) else None,
            )
            for one in chosen
        ]

    def _lost(self, recipe: Recipe) -> list[tuple[float, float]]:
        """Round all that `recipe` rounds, in the way it says, and return squares for each call."""
        if self._stats is None:  # no scales for attention
            recipe = replace(recipe, attention=None, attention_rules=())
        steps = passes.quantization(recipe, self._stats)
        rounded = pipeline.run(self._smoothed(recipe), steps)
        pairs = zip(self.calls, self._expected, strict=True)
        found = [squares(_tensors(rounded(**call)), exact) for call, exact in pairs]
        rounded.release()
        self.forwards += len(self.calls)
        return found

    def _smoothed(self, recipe: Recipe) -> Program:
        return pipeline.run(self.program, passes.smoothing(recipe, self._stats))


def root_of_squares(errors: Iterable[float]) -> float:
    """Return what independent errors come to together."""
    return math.sqrt(sum(error * error for error in errors))


def _relative(found: Sequence[tuple[float, float]]) -> float:
    lost, total = (sum(part) for part in zip(*found, strict=True))
    return math.sqrt(lost / max(total, 1e-300))


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def table(found: Sensitivity, limit: int = 20) -> str:
    """Return the worst sites as a text table, and how errors add up."""
    rows = [
        [one.site, one.role, one.dtype, _percent(one.local), _percent(one.error)]
        for one in found.worst(limit)
    ]
    headers = ["site", "role", "type", "its own error", "the model's error"]
    lines = [
        f"all in {one.dtype}: {_percent(one.error)}, {_percent(one.predicted)} by the root of the "
        "sum of squares"
        for one in found.together
    ]
    more = f"and {len(found.sites) - limit} smaller ones" if len(found.sites) > limit else ""
    cost = f"{found.calls} calls, {found.forwards:.0f} forwards, {found.seconds:.0f} s"
    text = str(tabulate(rows, headers=headers, disable_numparse=True))
    return "\n".join(part for part in (text, more, *lines, cost) if part)


def _percent(value: float) -> str:
    return f"{100 * value:.3f} %"
