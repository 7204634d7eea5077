"""What a user says in `options`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wancompile.errors import CalibrationError, InputError
from wancompile.quant.stats import Stats
from wancompile.recipe import Recipe, resolve

_NAMES = ("recipe", "stats", "inductor")


@dataclass(frozen=True)
class Choice:
    """A recipe, the statistics it is applied with, if any, and whether Inductor goes on from it."""

    recipe: Recipe
    stats: Stats | None
    inductor: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Choice:
        """Check and resolve the options.

        Raises:
            InputError: one is unknown or of the wrong kind.
            RecipeError: there is no recipe of that name.
            CalibrationError: the recipe needs statistics, or the file holds none.
        """
        unknown = [name for name in options if name not in _NAMES]
        if unknown:
            raise InputError(f"unknown option {unknown[0]!r}; there are {', '.join(_NAMES)}")
        recipe, stats = options.get("recipe", "int8"), options.get("stats")
        inductor = options.get("inductor", False)
        if not isinstance(recipe, (str, Recipe)):
            raise InputError(f"recipe is a name or a Recipe, not {type(recipe).__name__}")
        if isinstance(stats, (str, Path)):
            stats = Stats.load(stats)
        if not isinstance(stats, (Stats, type(None))):
            raise InputError(f"stats is a Stats or the path of one, not {type(stats).__name__}")
        if not isinstance(inductor, bool):
            raise InputError(f"inductor is True or False, not {inductor!r}")
        chosen = resolve(recipe)
        if chosen.rounds_attention and stats is None:
            raise CalibrationError(
                f"the recipe {chosen.name!r} needs calibrated scales for its 8-bit attention: "
                "give options={'stats': ...}"
            )
        return cls(chosen, stats, inductor)
