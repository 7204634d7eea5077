"""How diffusers and the original Wan call the parameters of the same model.

The names themselves are data, in `names.json`: `rules` rewrite diffusers' names into the original
ones, `numbered` do so for blocks that the original counts from 1, `splits` name the linears that
fused projections stand for, and `classes` tell by an entry of the configuration which class of
diffusers it is one of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from wancompile.errors import ArtifactError


@dataclass(frozen=True)
class Original:
    """The name of a parameter in the original, and the shape it has there, -1 for what is left.

    Parameters with the same original name are parts of one, along their first dimension.
    """

    name: str
    shape: tuple[int, ...] = ()


def original(name: str) -> Original:
    """Return what the original Wan calls a parameter of diffusers' model.

    Raises:
        ArtifactError: no rule knows it.
    """
    for pattern, template, shape, from_one in _rules():
        found = pattern.fullmatch(name)
        if found is not None:
            numbered = from_one and template.format(int(found.group(1)) + 1)
            return Original(numbered or found.expand(template), shape)
    raise ArtifactError(f"the original Wan has no name for {name}, as far as is known")


def wholes(name: str) -> Iterator[tuple[str, int, int]]:
    """Yield where else a parameter may be: the name of a fused one, which part, of how many."""
    parts = name.split(".")
    for whole, split in _data()["splits"].items():
        for at, part in enumerate(parts):
            if part in split:
                yield (
                    ".".join([*parts[:at], whole, *parts[at + 1 :]]),
                    split.index(part),
                    len(split),
                )


def class_of(config: Mapping[str, Any]) -> str | None:
    """Return the class that a configuration is one of, None if it is of no Wan."""
    named = config.get("_class_name")
    return named or next((cls for key, cls in _data()["classes"] if key in config), None)


@cache
def _data() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(
        files(__package__).joinpath("names.json").read_text(encoding="utf-8")
    )
    return found


@cache
def _rules() -> tuple[tuple[re.Pattern[str], str, tuple[int, ...], bool], ...]:
    return tuple(
        (re.compile(one["name"]), one["original"], tuple(one.get("reshape", ())), from_one)
        for kind, from_one in (("rules", False), ("numbered", True))
        for one in _data()[kind]
    )
