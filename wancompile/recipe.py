"""Recipes: what to quantize, into what, with which exceptions. Frozen, and JSON both ways."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from wancompile.errors import RecipeError
from wancompile.ir.site import Attention, Group, Site

DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
ROUNDINGS = ("nearest", "gptq")
ACTIVATIONS = ("token", "static")


@dataclass(frozen=True)
class QSpec:
    """How the linears of a group are quantized.

    `dtype` is "int8" or "fp8" (e4m3); weights per output channel. `smooth` allows a smooth scale,
    `clip` clipped ranges of output channels, and `rounding="gptq"` GPTQ in the place of rounding
    weights to nearest, each where calibration shows that it lowers the error.

    `activation="token"` finds a scale for each token in each call. "static" takes one for all from
    calibration, for which there must be some; what lies outside of its range saturates. Behind a
    GELU the linear before it then rounds its own output.

    Raises:
        RecipeError: an argument is none of these.
    """

    dtype: str
    smooth: bool = True
    rounding: str = "nearest"
    clip: bool = False
    activation: str = "token"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RecipeError(f"unknown type {self.dtype!r}; there are {', '.join(DTYPES)}")
        if self.rounding not in ROUNDINGS:
            raise RecipeError(f"unknown rounding {self.rounding!r}; there are nearest and gptq")
        if self.activation not in ACTIVATIONS:
            kinds = " and ".join(ACTIVATIONS)
            raise RecipeError(f"unknown activation {self.activation!r}; there are {kinds}")
        for name, value in (("smooth", self.smooth), ("clip", self.clip)):
            if not isinstance(value, bool):
                raise RecipeError(f"{name} is true or false, not {value!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The storage type."""
        return DTYPES[self.dtype]

    @property
    def name(self) -> str:
        """What it is called in `LINEARS`, whatever is done to its weights."""
        return f"{self.dtype}-static" if self.activation == "static" else self.dtype


@dataclass(frozen=True)
class Rule:
    """An exception: groups whose role or any member matches the glob `pattern` get `spec`.

    `spec=None` leaves them in floating point.
    """

    pattern: str
    spec: QSpec | None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise RecipeError(f"the pattern of a rule is text, not {self.pattern!r}")

    def matches(self, group: Group) -> bool:
        """Whether the rule speaks of `group`."""
        return any(fnmatchcase(name, self.pattern) for name in (group.role, *group.members))


@dataclass(frozen=True)
class AttentionSpec:
    """How a self-attention is quantized.

    `dtype` of q and k is "int8" or "fp8" (e4m3). In int8 each query has a scale of its own, in fp8
    all of a head have one from calibration, as those of k have in either. `values`, of v and of the
    weights that it is multiplied by, is "bf16" or "fp8"; q and k in fp8 lose so much that only fp8
    goes with them.

    Raises:
        RecipeError: an argument is none of these.
    """

    dtype: str
    values: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise RecipeError(f"unknown attention type {self.dtype!r}")
        if self.values not in ("bf16", "fp8"):
            raise RecipeError(f"unknown type of values {self.values!r}; there are bf16 and fp8")
        if (self.dtype, self.values) == ("fp8", "bf16"):
            raise RecipeError("values in bf16 go with q and k in int8, not in fp8")

    def __str__(self) -> str:
        return f"q, k in {self.dtype}, v in {self.values}"

    @property
    def name(self) -> str:
        """What it is called in `ATTENTIONS`."""
        return next(name for name, one in ATTENTIONS.items() if one == self)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The storage type of q and k."""
        return DTYPES[self.dtype]

    @property
    def scales_queries(self) -> bool:
        """Whether each query has a scale of its own, found in the call."""
        return self.dtype == "int8"

    @property
    def rounds_values(self) -> bool:
        """Whether v has 8 bits, and a scale from calibration."""
        return self.values == "fp8"


@dataclass(frozen=True)
class AttentionRule:
    """An exception: self-attentions whose site matches the glob `pattern` get `spec`.

    A site is such as `blocks.3.attn1:attention`. `spec=None` leaves them in floating point.
    """

    pattern: str
    spec: AttentionSpec | None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise RecipeError(f"the pattern of an attention rule is text, not {self.pattern!r}")
        _check_attention(self.spec)

    def matches(self, site: Site) -> bool:
        """Whether the rule speaks of the attention at `site`."""
        return fnmatchcase(str(site), self.pattern)


@dataclass(frozen=True)
class Recipe:
    """What to quantize into what; `name` is for reports.

    `linears` holds for every group; later `rules` override earlier ones and the default.
    `attention` holds for every self-attention, and `attention_rules` override it in the same way.
    None is floating point.
    """

    name: str
    linears: QSpec | None
    rules: tuple[Rule, ...] = ()
    attention: AttentionSpec | None = None
    attention_rules: tuple[AttentionRule, ...] = ()

    def __post_init__(self) -> None:
        _check_attention(self.attention)

    def spec_for(self, group: Group) -> QSpec | None:
        """Return how `group` is quantized, or None."""
        spec = self.linears
        for rule in self.rules:
            if rule.matches(group):
                spec = rule.spec
        return spec

    def attention_for(self, site: Site) -> AttentionSpec | None:
        """Return how the self-attention at `site` is quantized, or None."""
        spec = self.attention
        for rule in self.attention_rules:
            if rule.matches(site):
                spec = rule.spec
        return spec

    @property
    def rounds_attention(self) -> bool:
        """Whether any self-attention may be in 8 bits, for which there must be calibration."""
        return any((self.attention, *(rule.spec for rule in self.attention_rules)))

    @property
    def scales_inputs(self) -> bool:
        """Whether any linear may have a static scale, for which there must be calibration."""
        specs = (self.linears, *(rule.spec for rule in self.rules))
        return any(spec is not None and spec.activation == "static" for spec in specs)

    def check(self, groups: Sequence[Group], attentions: Sequence[Attention] = ()) -> None:
        """Raise `RecipeError`, with the nearest misses, if a rule matches nothing."""
        names = sorted({name for group in groups for name in (str(group.role), *group.members)})
        for rule in self.rules:
            if not any(rule.matches(group) for group in groups):
                raise RecipeError(
                    f"the rule {rule.pattern!r} matches no group; "
                    f"nearest are {', '.join(_nearest(rule.pattern, names))}"
                )
        sites = [one.site for one in attentions]
        for one in self.attention_rules:
            if not any(map(one.matches, sites)):
                nearest = _nearest(one.pattern, [str(site) for site in sites])
                raise RecipeError(
                    f"the rule {one.pattern!r} matches no attention; "
                    f"nearest are {', '.join(nearest)}"
                )

    def with_rules(self, rules: Iterable[Rule]) -> Recipe:
        """Return this recipe with more rules at its end."""
        return replace(self, rules=(*self.rules, *rules))

    def with_float_attention(self, patterns: Iterable[str]) -> Recipe:
        """Return this recipe with more attentions left in floating point."""
        rules = (AttentionRule(pattern, None) for pattern in patterns)
        return replace(self, attention_rules=(*self.attention_rules, *rules))

    def to_json(self) -> str:
        """Return the recipe as JSON."""
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def auto(
        *,
        max_error: float | None = None,
        max_ms: float | None = None,
        tokens: int | None = None,
        types: Sequence[str] = tuple(DTYPES),
        attention: bool = True,
        device: str = "h100",
    ) -> Auto:
        """Return a request for the recipe that suits a budget; see `Auto`."""
        return Auto(max_error, max_ms, tokens, tuple(types), attention, device)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Return the recipe that `to_json` wrote; raise `RecipeError` for anything else."""
        try:
            data: dict[str, Any] = json.loads(text)
            rules = tuple(_rule(one) for one in data["rules"])
            parts = {
                "linears": _spec(data["linears"]),
                "rules": rules,
                "attention": _attention(data.get("attention")),
                "attention_rules": tuple(map(_attention_rule, data.get("attention_rules", ()))),
            }
            return cls(**{**data, **parts})
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"this is no recipe: {error}") from error


@dataclass(frozen=True)
class Auto:
    """A wish in the place of a recipe: `compile` chooses a type for each site after calibration.

    `max_error` bounds the relative L2 error of the model's output on every single call that was
    held out from calibration, with weights rounded as they will be; within it the time is least.
    Calls at the last steps of sampling err several times as much as the first, so the bound is as
    good as the calls: calibrate with the steps that you will sample with. The report names the
    timesteps that were measured.

    `max_ms` is the longest time, in milliseconds, of one call of all of the model's blocks with
    `tokens` video tokens (by default those of the first call seen); within it the error is least.
    With both, the error must be reached in the time.

    `types`, some of `LINEARS`, may be used, as fast as they were measured on `device`; those with
    scales per token for self-attention too if `attention` is set, those with static ones behind an
    activation alone, where they save a pass over memory.
    """

    max_error: float | None = None
    max_ms: float | None = None
    tokens: int | None = None
    types: tuple[str, ...] = tuple(DTYPES)
    attention: bool = True
    device: str = "h100"

    def __post_init__(self) -> None:
        budgets = {"max_error": self.max_error, "max_ms": self.max_ms}
        if all(one is None for one in budgets.values()):
            raise RecipeError("an automatic recipe needs max_error or max_ms")
        for name, one in (*budgets.items(), ("tokens", self.tokens)):
            if one is not None and not (_is_number(one) and 0 < one < math.inf):
                raise RecipeError(f"{name} is a positive number, not {one!r}")
        unknown = [one for one in self.types if one not in LINEARS]
        if unknown or not self.types:
            raise RecipeError(f"types are some of {', '.join(LINEARS)}, not {self.types!r}")

    @property
    def name(self) -> str:
        """The name of the recipe that this becomes."""
        budgets = (("max_error", self.max_error), ("max_ms", self.max_ms))
        return "auto " + ", ".join(f"{name} {one:g}" for name, one in budgets if one is not None)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_attention(spec: object) -> None:
    if spec is not None and not isinstance(spec, AttentionSpec):
        raise RecipeError(f"attention is an AttentionSpec or None, not {spec!r}")


def _spec(data: dict[str, Any] | None) -> QSpec | None:
    return None if data is None else QSpec(**data)


def _rule(data: dict[str, Any]) -> Rule:
    return Rule(**{**data, "spec": _spec(data["spec"])})


def _attention(data: dict[str, Any] | None) -> AttentionSpec | None:
    return None if data is None else AttentionSpec(**data)


def _attention_rule(data: dict[str, Any]) -> AttentionRule:
    return AttentionRule(**{**data, "spec": _attention(data["spec"])})


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    plain = pattern.replace("*", "")
    return difflib.get_close_matches(plain, names, n=3, cutoff=0.0) or list(names[:3])


LINEARS: dict[str, QSpec] = {
    one.name: one
    for one in (QSpec(dtype, activation=kind) for kind in ACTIVATIONS for dtype in DTYPES)
}
"""All ways to quantize a linear, by what they are called where one is chosen."""

ATTENTIONS: dict[str, AttentionSpec] = {
    "int8": AttentionSpec("int8", "bf16"),
    "int8-fast": AttentionSpec("int8", "fp8"),
    "fp8": AttentionSpec("fp8", "fp8"),
}
"""All ways to quantize self-attention, by what they are called where one is chosen."""

_INT8 = QSpec("int8", rounding="gptq", clip=True)
_FP8 = QSpec("fp8", rounding="gptq", clip=True)

RECIPES: dict[str, Recipe] = {
    "int8": Recipe("int8", _INT8),
    "fp8": Recipe("fp8", _FP8),
    "int8-attention": Recipe("int8-attention", _INT8, attention=ATTENTIONS["int8"]),
    "int8-attention-fast": Recipe("int8-attention-fast", _INT8, attention=ATTENTIONS["int8-fast"]),
    "fp8-attention": Recipe("fp8-attention", _FP8, attention=ATTENTIONS["fp8"]),
}
"""The recipes that have a name.

    int8                   linears in int8
    int8-attention         self-attention, too: q and k in int8, v in bf16
    int8-attention-fast    the same, but v in e4m3
    fp8                    linears in e4m3
    fp8-attention          self-attention, too: q, k and v in e4m3

Each allows smooth scales, clipped ranges and GPTQ, which are taken group by group where calibration
shows that they lower the error. Without calibration weights are rounded to nearest, and nothing is
smoothed.
"""


def resolve(recipe: str | Recipe) -> Recipe:
    """Return a recipe given by name or as it is."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        near = difflib.get_close_matches(recipe, RECIPES, n=1, cutoff=0.0)
        raise RecipeError(
            f"no recipe {recipe!r}; there are {', '.join(RECIPES)} (nearest: {near[0]})"
        )
    return RECIPES[recipe]
