"""A model that is traced once and compiled many times: tracing is half of what compiling costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from wancompile.build import Options, build, prepare
from wancompile.compiled import CompiledModel
from wancompile.gate.limits import Limits
from wancompile.program import Program
from wancompile.quant.stats import Stats
from wancompile.recipe import Recipe, resolve
from wancompile.samples import CalibData
from wancompile.start import Prepared


@dataclass(frozen=True, eq=False)
class Traced:
    """A model, and what `wancompile.compile` makes of it before it looks at the recipe."""

    model: nn.Module
    prepared: Prepared

    @classmethod
    def on(
        cls,
        model: nn.Module,
        data: CalibData | None = None,
        *,
        example: Mapping[str, Any] | None = None,
    ) -> Traced:
        """Trace `model`, and calibrate it if there is data; without, an example shows a call."""
        return cls(model, prepare(model, data, None, example, _options("int8", Limits())))

    @property
    def program(self) -> Program:
        """The program at level NORMAL."""
        return self.prepared.program

    def compiled(
        self,
        recipe: str | Recipe,
        *,
        stats: Stats | None = None,
        limits: Limits | None = None,
    ) -> CompiledModel:
        """Compile with these statistics in the place of those of `on`, within the usual limits."""
        prepared = self.prepared if stats is None else replace(self.prepared, stats=stats)
        return build(self.model, prepared, _options(recipe, limits or Limits()))


def _options(recipe: str | Recipe, limits: Limits) -> Options:
    return Options(
        recipe=resolve(recipe),
        consume=False,
        device=None,
        limits=limits,
        checkpoint=None,
        progress=False,
        dump=None,
    )
