"""Frozen dataclasses as JSON and back, by the types of their fields.

Reports are made of a dozen of them. What can be read is exactly what the annotations allow:
numbers, text, enums by value or (levels) by name, sites as text, tuples, mappings from text, other
such dataclasses, and None where a field may be None.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum, IntEnum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from wancompile.errors import ArtifactError
from wancompile.ir.site import Site

T = TypeVar("T")


def to_data(value: Any) -> Any:
    """Return `value`, a dataclass or a part of one, as JSON data."""
    if isinstance(value, Site):
        return str(value)
    if isinstance(value, Enum):
        return value.name if isinstance(value, IntEnum) else value.value
    if is_dataclass(value):
        return {one.name: to_data(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_data(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): to_data(one) for key, one in value.items()}
    if type(value) is float and not math.isfinite(value):
        return str(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ArtifactError(f"{value!r} of type {type(value).__name__} cannot be saved")


def from_data(kind: type[T], data: Any) -> T:
    """Return the `kind` that `to_data` wrote; raise `ArtifactError` if it is something else."""
    found: T = _read(kind, data)
    return found


def _read(kind: Any, data: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _read_union(inner, data)
    if origin is tuple:
        return _read_tuple(kind, inner, data)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _need(isinstance(data, dict), kind, data)
        return {_read(inner[0], key): _read(inner[1], one) for key, one in data.items()}
    if kind is Site:
        _need(isinstance(data, str), kind, data)
        return Site.parse(data)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _read_enum(kind, data)
    if is_dataclass(kind):
        return _read_fields(kind, data)
    return _read_plain(kind, data)


def _read_union(kinds: tuple[Any, ...], data: Any) -> Any:
    if data is None:
        _need(type(None) in kinds, kinds, data)
        return None
    (kind,) = (one for one in kinds if one is not type(None))
    return _read(kind, data)


def _read_tuple(kind: Any, inner: tuple[Any, ...], data: Any) -> tuple[Any, ...]:
    _need(isinstance(data, list), kind, data)
    if len(inner) == 2 and inner[1] is Ellipsis:
        return tuple(_read(inner[0], one) for one in data)
    _need(len(data) == len(inner), kind, data)
    return tuple(_read(one, part) for one, part in zip(inner, data, strict=True))


def _read_enum(kind: type[Enum], data: Any) -> Enum:
    try:
        return kind[data] if issubclass(kind, IntEnum) else kind(data)
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"{data!r} is no {kind.__name__}") from error


def _read_fields(kind: Any, data: Any) -> Any:
    hints = _types(kind)
    _need(isinstance(data, dict) and data.keys() <= hints.keys(), kind, data)
    # A field with a default may be younger than what was saved.
    _need(all(name in data for name in _needed(kind)), kind, data)
    return kind(**{name: _read(hints[name], one) for name, one in data.items()})


@cache
def _types(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {one.name: hints[one.name] for one in fields(kind)}


@cache
def _needed(kind: Any) -> tuple[str, ...]:
    defaults = (MISSING, MISSING)
    return tuple(one.name for one in fields(kind) if (one.default, one.default_factory) == defaults)


def _read_plain(kind: Any, data: Any) -> Any:
    if kind is float and data in ("inf", "-inf", "nan"):
        return float(data)
    # JSON of whole numbers is that of floats, too; a bool is an int only to Python.
    accepted = (int, float) if kind is float else (kind,)
    _need(kind in (bool, int, float, str) and type(data) in accepted, kind, data)
    return kind(data)


def _need(holds: bool, kind: Any, data: Any) -> None:
    if not holds:
        name = getattr(kind, "__name__", str(kind))
        raise ArtifactError(f"{str(data)[:80]} is no {name}")
