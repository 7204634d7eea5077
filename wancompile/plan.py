"""Plan: what the compiler would do to a model, from its shapes alone.

Everything here is read off a NORMAL program whose weights may be on the meta device, so a plan of
the largest model takes seconds and no memory for weights.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from wancompile import hoist
from wancompile.api import trace
from wancompile.errors import LevelError
from wancompile.flops import Work, fixed, flops, numel, size_of, work_of
from wancompile.ir import match
from wancompile.ir.levels import Level
from wancompile.ir.site import Group, Site
from wancompile.program import Program
from wancompile.recipe import QSpec, Recipe, resolve


@dataclass(frozen=True)
class InputFact:
    """One tensor input with the shape and the dtype it was traced with."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Facts:
    """The model as its graph shows it.

    `parameters` counts the elements and `nbytes` the bytes of all stored tensors, `dtypes` those
    bytes by type, largest first. `tokens`, `heads` and `head_dim` are those of the first
    self-attention, 0 where there is none.
    """

    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    inputs: tuple[InputFact, ...]
    nodes: int
    self_attentions: int
    cross_attentions: int
    tokens: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class GroupPlan:
    """The groups that are alike in role, source, fold and treatment: usually a role's all.

    `dtype` is None where the recipe leaves them in floating point. `bytes_before` counts weights
    and biases as stored, `bytes_after` with 8-bit weights, one fp32 scale per output channel, and
    biases as they are; smooth vectors that calibration may add where nothing folds (4 bytes per
    input channel) are not in it. `flops` is the work of one call of the model.
    """

    role: str
    source: str
    fold: str
    fold_reason: str
    dtype: str | None
    smooth: bool
    groups: int
    linears: int
    bytes_before: int
    bytes_after: int
    flops: int


@dataclass(frozen=True)
class Leftover:
    """The linears that are in no group for one reason; `sites` names them all."""

    reason: str
    sites: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Steady:
    """What is the same in every call of a denoising loop, and so is computed once for each prompt.

    `inputs` are the tensors that it is computed from, `linears` counts those of the model.
    `bytes_before` and `bytes_after` are those of the stored tensors that nothing else reads, with
    the groups as `GroupPlan` counts them; `flops` is their work. `cached_bytes` is what is kept of
    one prompt.
    """

    inputs: tuple[str, ...]
    linears: int
    bytes_before: int
    bytes_after: int
    flops: int
    cached_bytes: int


@dataclass(frozen=True)
class Plan:
    """What `recipe` would do to a model, and what one call of it costs.

    `bytes_before` and `bytes_after` count all stored tensors. `steady` is None where nothing is the
    same in every call. `seconds` is the time of planning,
    `peak_bytes` the largest resident size of this process so far, None where the system does not
    tell.
    """

    recipe: Recipe
    facts: Facts
    groups: tuple[GroupPlan, ...]
    leftovers: tuple[Leftover, ...]
    work: tuple[Work, ...]
    steady: Steady | None = None
    seconds: float = 0.0
    peak_bytes: int | None = None

    @property
    def bytes_before(self) -> int:
        """Bytes of all stored tensors as they are."""
        return self.facts.nbytes

    @property
    def bytes_after(self) -> int:
        """Bytes of all stored tensors once the groups are quantized."""
        return self.bytes_before - sum(one.bytes_before - one.bytes_after for one in self.groups)

    @property
    def flops(self) -> int:
        """FLOPs of one call of the model."""
        return sum(one.flops for one in self.work)

    @property
    def quantized_flops(self) -> int:
        """FLOPs of one call of the model that would run in 8 bits."""
        return sum(one.quantized for one in self.work)


def plan(
    model: torch.nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any],
    recipe: str | Recipe = "int8",
) -> Plan:
    """Trace `model` at the shapes of `example_inputs` and say what `recipe` would do to it.

    Args:
        model: a Wan transformer; on the meta device nothing is ever allocated for its weights.
        example_inputs: one call of `model.forward`; its shapes are those the FLOPs are counted at.
        recipe: the name of a recipe, or one.

    Raises:
        RecipeError: the recipe is unknown, or one of its rules matches nothing.
        WancompileError: the model cannot be traced; see `trace`.
    """
    started = time.perf_counter()
    found = plan_program(trace(model, example_inputs, dynamic=False), resolve(recipe))
    seconds = time.perf_counter() - started
    return Plan(**{**vars(found), "seconds": seconds, "peak_bytes": peak_bytes()})


def plan_program(program: Program, recipe: Recipe) -> Plan:
    """Plan for a program at level NORMAL with fixed shapes.

    Raises:
        LevelError: the program is at another level.
        InputError: it was traced with dynamic dimensions, so there is no work to count.
        RecipeError: a rule of the recipe matches nothing.
    """
    if program.level is not Level.NORMAL:
        raise LevelError(f"a plan needs level NORMAL, the program is at {program.level.name}")
    recipe.check(program.groups, program.attentions)
    nodes = match.by_site(program.graph)
    return Plan(
        recipe=recipe,
        facts=_facts(program, nodes),
        groups=_groups(program, recipe, nodes),
        leftovers=_leftovers(program, nodes),
        work=work_of(program, recipe),
        steady=_steady(program, recipe),
    )


def peak_bytes() -> int | None:
    """Return the largest resident size of this process so far, None where it is not known."""
    if sys.platform == "win32":
        return None
    import resource

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _facts(program: Program, nodes: Mapping[Site, Node]) -> Facts:
    dtypes: Counter[str] = Counter()
    for tensor in program.state.values():
        dtypes[_name(tensor.dtype)] += tensor.numel() * tensor.element_size()
    own = [one for one in program.attentions if one.is_self]
    shape = match.shape(match.args(nodes[own[0].site])[0]) if own else (0, 0, 0, 0)
    return Facts(
        parameters=sum(tensor.numel() for tensor in program.state.values()),
        nbytes=program.nbytes,
        dtypes=dict(dtypes.most_common()),
        inputs=tuple(_input(node) for node in program.graph.nodes if node.op == "placeholder"),
        nodes=len(program.graph.nodes),
        self_attentions=len(own),
        cross_attentions=len(program.attentions) - len(own),
        tokens=fixed(shape[-2]),
        heads=fixed(shape[-3]),
        head_dim=fixed(shape[-1]),
    )


def _input(node: Node) -> InputFact:
    shape = tuple(fixed(size) for size in match.shape(node))
    return InputFact(node.name, shape, _name(match.val(node).dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _groups(program: Program, recipe: Recipe, nodes: Mapping[Site, Node]) -> tuple[GroupPlan, ...]:
    alike: dict[tuple[object, ...], list[Group]] = {}
    for group in program.groups:
        key = (group.role, group.source, group.fold, group.fold_reason, recipe.spec_for(group))
        alike.setdefault(key, []).append(group)
    return tuple(_group_plan(found, recipe, nodes) for found in alike.values())


def _group_plan(groups: Sequence[Group], recipe: Recipe, nodes: Mapping[Site, Node]) -> GroupPlan:
    first, spec = groups[0], recipe.spec_for(groups[0])
    linears = [nodes[site] for group in groups for site in group.sites]
    return GroupPlan(
        role=first.role,
        source=first.source,
        fold=first.fold,
        fold_reason=first.fold_reason,
        dtype=spec.dtype if spec else None,
        smooth=spec.smooth if spec else False,
        groups=len(groups),
        linears=len(linears),
        bytes_before=_linear_bytes(linears, None),
        bytes_after=_linear_bytes(linears, spec),
        flops=sum(map(flops, linears)),
    )


def _linear_bytes(linears: Iterable[Node], spec: QSpec | None) -> int:
    """Return the bytes of weights and biases, quantized as `spec` says; each tensor counts once."""
    total, seen = 0, set()
    for node in linears:
        for index, operand in enumerate(match.args(node)[1:3]):
            key = operand.target if match.is_constant(operand) else operand
            if operand is None or key in seen:
                continue
            seen.add(key)
            is_weight = index == 0
            total += _quantized_bytes(operand, spec) if is_weight and spec else _bytes(operand)
    return total


def _quantized_bytes(weight: Node, spec: QSpec) -> int:
    scales = size_of(weight, 0) * torch.float32.itemsize
    return numel(weight) * spec.torch_dtype.itemsize + scales


def _bytes(node: Node) -> int:
    return numel(node) * match.val(node).element_size()


def _leftovers(program: Program, nodes: Mapping[Site, Node]) -> tuple[Leftover, ...]:
    sites: dict[str, list[Site]] = {}
    for one in program.ungrouped:
        sites.setdefault(one.reason, []).append(one.site)
    return tuple(
        Leftover(
            reason, tuple(map(str, found)), _linear_bytes([nodes[site] for site in found], None)
        )
        for reason, found in sites.items()
    )


def _steady(program: Program, recipe: Recipe) -> Steady | None:
    found = hoist.find(program)
    if found is None:
        return None
    gain = hoist.facts(program, found)
    specs: dict[Site | None, QSpec | None] = {
        site: recipe.spec_for(group) for group in program.groups for site in group.sites
    }
    linears = {match.stored_name(match.args(n)[1]): n for n in found.hoisted if match.is_linear(n)}
    saved = sum(
        _linear_bytes([node], None) - _linear_bytes([node], specs.get(match.site(node)))
        for name, node in linears.items()
        if name in found.weights
    )
    return Steady(
        inputs=gain.inputs,
        linears=gain.linears,
        bytes_before=gain.weight_bytes,
        bytes_after=gain.weight_bytes - saved,
        flops=sum(map(flops, found.hoisted)),
        cached_bytes=gain.cached_bytes,
    )
