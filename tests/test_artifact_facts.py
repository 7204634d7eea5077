"""Constants and dataclasses as JSON and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from typing import Any, get_args, get_type_hints

import pytest
import torch

from wancompile.artifact import facts, values
from wancompile.errors import ArtifactError
from wancompile.ir.levels import Level
from wancompile.ir.site import Role, Site
from wancompile.report import Report

VALUES = [
    None,
    True,
    0,
    -(2**70),
    0.1,
    1e-300,
    'text with "quotes" and \n lines and \u20ac',
    [1, [2.0, None]],
    (1, (2, [3])),
    {"a": (1, 2), "tuple": [3]},
    {},
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.contiguous_format,
    torch.channels_last_3d,
    torch.strided,
    math.inf,
    -math.inf,
]


def through_text(data: Any) -> Any:
    return json.loads(json.dumps(data, allow_nan=False))


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_with_their_types(value):
    found = values.decode(through_text(values.encode(value)))
    assert found == value
    assert type(found) is type(value)
    assert repr(found) == repr(value)


def test_nan_is_a_value_and_devices_lose_their_name():
    assert math.isnan(values.decode(through_text(values.encode(math.nan))))
    assert values.decode(values.encode(torch.device("cuda:1"))) == torch.device("cpu")


@pytest.mark.parametrize(
    "value", [object(), {1: 2}, torch.zeros(1), {"a": {3}}, slice(1), 1j, torch.Size([1]), b"x"]
)
def test_other_values_are_refused(value):
    with pytest.raises(ArtifactError, match="cannot be saved"):
        values.encode(value)


@pytest.mark.parametrize(
    "data",
    [{}, {"tuple": 3}, {"dict": [1]}, {"float": "7"}, {"dtype": "load"}, {"x": 1}, {"node": "a"}],
)
def test_other_data_are_refused(data):
    with pytest.raises(ArtifactError, match="is no value of an artifact"):
        values.decode(data)


@dataclass(frozen=True)
class Part:
    site: Site
    share: float
    role: Role | None = None


@dataclass(frozen=True)
class Whole:
    level: Level
    parts: tuple[Part, ...]
    pair: tuple[int, str]
    table: Mapping[str, tuple[float, ...]]
    flag: bool = False


WHOLE = Whole(
    Level.FUSED,
    (Part(Site("a.b", 2), 0.5, Role.ATTN_Q), Part(Site("c"), math.inf)),
    (3, "x"),
    {"a": (1.0, -math.inf)},
)


def test_dataclasses_come_back():
    data = through_text(facts.to_data(WHOLE))
    assert data["parts"][0] == {"site": "a.b#2", "share": 0.5, "role": "attn_q_proj"}
    assert data["level"] == "FUSED"
    assert facts.from_data(Whole, data) == WHOLE
    del data["flag"], data["parts"][1]["role"]
    assert facts.from_data(Whole, data) == WHOLE


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("level",), "NORM"),
        (("level",), 4),
        (("parts",), {}),
        (("parts", 0), ["a", 1]),
        (("parts", 0, "site"), 3),
        (("parts", 0, "share"), "much"),
        (("parts", 0, "share"), True),
        (("parts", 0, "role"), 1),
        (("pair",), [1]),
        (("pair",), [True, "x"]),
        (("pair", 0), 1.0),
        (("table",), [1]),
        (("table", "a"), None),
        (("flag",), 1),
        (("flag",), None),
        (("more",), 1),
    ],
)
def test_data_of_another_kind_are_refused(place, value):
    data = facts.to_data(WHOLE)
    holder = data
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    with pytest.raises(ArtifactError, match=" is no "):
        facts.from_data(Whole, data)


def test_a_field_without_a_default_is_needed():
    data = facts.to_data(WHOLE)
    del data["pair"]
    with pytest.raises(ArtifactError, match="is no Whole"):
        facts.from_data(Whole, data)


def test_what_is_no_fact_is_refused():
    with pytest.raises(ArtifactError, match="cannot be saved"):
        facts.to_data({"x": object()})


def kinds_in(kind: Any, seen: set[Any]) -> set[Any]:
    """Return every type that is named in the fields of `kind`, and in theirs."""
    inner = get_args(kind)
    if inner:
        for one in inner:
            kinds_in(one, seen)
    elif kind not in seen:
        seen.add(kind)
        if is_dataclass(kind) and kind is not Site:
            for one in get_type_hints(kind).values():
                kinds_in(one, seen)
    return seen


def test_all_that_a_report_can_hold_can_be_read():
    """Whoever gives a report a field of a new kind has to teach `facts` that kind."""
    known = {bool, int, float, str, type(None), Ellipsis}
    for kind in kinds_in(Report, set()) - known:
        assert is_dataclass(kind) or issubclass(kind, Enum), kind
