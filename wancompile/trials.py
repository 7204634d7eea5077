"""Trials: a float program in which some sites round, without a graph for each of them.

A site rounds by the ops that quantization would put there, on the values that a running float
program has at that moment. Trials of one site branch off the float run in front of it, so that what
comes before is computed once for all trials of all sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from wancompile.ir import edit, match
from wancompile.ir.site import Attention, Group, Site
from wancompile.passes.quantize_attention import (
    is_turned,
    obstacle,
    softmax_scale,
    stats_of,
    too_few_tokens,
    value_inverse,
)
from wancompile.passes.quantize_linears import take_up_scale
from wancompile.passes.rounding import input_scale
from wancompile.program import Program
from wancompile.quant.head_scales import HeadScales
from wancompile.quant.numerics import quantize_weight
from wancompile.quant.stats import Stats
from wancompile.recipe import AttentionSpec, QSpec, Recipe

ops = torch.ops.wancompile

Env = dict[Node, Any]
Rounding = Callable[[Env], Tensor]
SELF_ATTENTION = "self-attention"


@dataclass(frozen=True, eq=False)
class Trial:
    """One site in one 8-bit type: what its calls yield instead.

    `site` is the key of a group or the site of a self-attention, `role` as in reports. `dtype` is a
    name in `LINEARS`, of an attention one in `ATTENTIONS`. `roundings` computes, for each node of
    the program's module, its rounded value from those that it reads; `reads` are the values that
    must still be there when it does.
    """

    site: Site
    role: str
    dtype: str
    roundings: Mapping[Node, Rounding]
    reads: frozenset[Node]


def trials(program: Program, recipe: Recipe, stats: Stats | None) -> list[Trial]:
    """Return one trial for each group and self-attention that `recipe` puts in 8 bits, in order.

    `program` is smoothed as it is to be. Without statistics, which static scales come from,
    attentions are left out, and so are linears with such a scale; attentions also where calibration
    saw too few tokens.

    Raises:
        CalibrationError: the statistics have nothing for a site.
    """
    nodes = match.by_site(program.module.graph)
    groups = {site: group for group in program.groups for site in group.sites}
    specs = [(group, recipe.spec_for(group)) for group in program.groups]
    found = [_of_group(program, group, nodes, stats, spec) for group, spec in specs if spec]
    for attention in program.attentions if stats is not None else ():
        spec, node = recipe.attention_for(attention.site), nodes[attention.site]
        if spec is None or obstacle(attention, node):
            continue
        if not too_few_tokens(stats, attention, nodes, groups):
            found.append(_of_attention(program, attention, node, groups, stats, spec))
    position = match.position(program.module.graph)
    kept = [one for one in found if one.roundings]
    return sorted(kept, key=lambda one: min(map(position.__getitem__, one.roundings)))


def _of_group(
    program: Program,
    group: Group,
    nodes: Mapping[Site, Node],
    stats: Stats | None,
    spec: QSpec,
) -> Trial:
    members = [
        node
        for node in (nodes[site] for site in group.sites)
        if match.is_float_linear(node) and match.reads_only_constants(match.args(node)[1])
    ]
    scale = None
    if spec.activation == "static":
        members = members if stats is not None else []
        scale = _static_scale(program, group, members, stats, spec)
    roundings = {node: _rounded_linear(program, node, spec.torch_dtype, scale) for node in members}
    reads = frozenset(
        one
        for node in members
        for one in (*take_up_scale(match.args(node)[0]), match.arg(node, 2, "bias"))
        if one is not None
    )
    return Trial(group.key, str(group.role), spec.name, roundings, reads)


def _static_scale(
    program: Program, group: Group, members: Sequence[Node], stats: Stats | None, spec: QSpec
) -> Tensor | None:
    if not members:
        return None
    inverse = program.state.get(group.smoothing.inverse) if group.smoothing else None
    return input_scale(stats, group, members[0], inverse, spec.torch_dtype)


def _rounded_linear(
    program: Program, node: Node, dtype: torch.dtype, static: Tensor | None
) -> Rounding:
    producer, inverse = take_up_scale(match.args(node)[0])
    weight, bias = match.args(node)[1], match.arg(node, 2, "bias")
    out = match.val(node).dtype

    def rounded(env: Env) -> Tensor:
        x, smooth = env[producer], _value(env, inverse)
        if static is None:
            q, scale = ops.quantize_per_token(x, smooth, dtype)
        else:
            scale = static.to(x.device)
            q = ops.quantize_per_tensor(x, smooth, scale, dtype)
        stored = quantize_weight(edit.evaluate_constant(weight, program.state), dtype)
        result: Tensor = ops.scaled_linear(
            q, scale, stored.data, stored.scale, _value(env, bias), out
        )
        return result

    return rounded


def _value(env: Env, node: Node | None) -> Any:
    return None if node is None else env[node]


def _of_attention(
    program: Program,
    attention: Attention,
    node: Node,
    groups: Mapping[Site, Group],
    stats: Stats | None,
    spec: AttentionSpec,
) -> Trial:
    operands = match.args(node)[:3]
    inverse = value_inverse(program.state, attention, groups)
    scales = HeadScales.of(stats_of(stats, attention, node), inverse, spec.torch_dtype)
    turns, dtype = is_turned(node), spec.torch_dtype

    def rounded(env: Env) -> Tensor:
        q, k, v = (env[one] for one in operands)
        q_scale, k_scale, v_scale = (one.to(q.device) for one in (scales.q, scales.k, scales.v))
        if turns:
            q, k = ops.hadamard(q), ops.hadamard(k)
        if scales.middle is not None:
            k = k - scales.middle.to(k.device)
        if spec.scales_queries:
            q, q_scale = ops.quantize_per_token(q, None, dtype)
        else:
            q = ops.quantize_per_head(q, q_scale, dtype)
        k = ops.quantize_per_head(k, k_scale, dtype)
        given = q, k, v, q_scale, k_scale, v_scale if spec.rounds_values else None
        result: Tensor = ops.scaled_attention(*given, softmax_scale(node), match.val(node).dtype)
        return result

    return Trial(attention.site, SELF_ATTENTION, spec.name, {node: rounded}, frozenset(operands))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a trial did on one call: squared errors, and squared values, at the site and at the end.

    `local` is of the site's own outputs on exact inputs, `final` of the program's outputs.
    """

    trial: Trial
    local: tuple[float, float]
    final: tuple[float, float]


class Branches(Interpreter):
    """Runs a program, and from each trial's site on once more with that site rounded.

    Two sets of values are held at a time: those of the float run, which waits, and of one trial.

    Attributes:
        executed: nodes run so far; `len(program.graph.nodes)` of them are one forward.
    """

    def __init__(self, program: Program, chosen: Sequence[Trial]) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self._bind = program.signature.bind
        self._nodes = list(program.module.graph.nodes)
        self._dead = _last_readers(self._nodes, chosen)
        self._starting: dict[Node, list[Trial]] = {}
        position = match.position(program.module.graph)
        for trial in chosen:
            first = min(trial.roundings, key=position.__getitem__)
            self._starting.setdefault(first, []).append(trial)
        self.executed = 0

    def outcomes(self, call: Mapping[str, Any], expected: Sequence[Tensor]) -> Iterator[Outcome]:
        """Yield what each trial does on `call`; `expected` are the program's own outputs."""
        self._begin(call)
        for index, node in enumerate(self._nodes):
            for trial in self._starting.get(node, ()):
                waiting = self.env
                self.env = dict(waiting)
                local: list[tuple[float, float]] = []
                compared = {
                    one: self._compared(one, rounding, local)
                    for one, rounding in trial.roundings.items()
                }
                final = squares(self._finish(index, compared), expected)
                self.env = waiting
                lost, total = zip(*local, strict=True)
                yield Outcome(trial, (sum(lost), sum(total)), final)
            self._step(index, {})

    def _begin(self, call: Mapping[str, Any]) -> None:
        self.env = {}
        self.args_iter = iter(self._bind((), call))

    def _finish(self, start: int, roundings: Mapping[Node, Rounding]) -> list[Tensor]:
        """Run from `start` to the end and return the outputs."""
        result: Any = None
        for index in range(start, len(self._nodes)):
            result = self._step(index, roundings)
        return [one for one in result if isinstance(one, Tensor)]

    def _step(self, index: int, roundings: Mapping[Node, Rounding]) -> Any:
        node = self._nodes[index]
        with torch.no_grad():
            value = roundings[node](self.env) if node in roundings else self.run_node(node)
        self.env[node] = value
        self.executed += 1
        for dead in self._dead[index]:
            self.env.pop(dead, None)
        return value

    def _compared(
        self, node: Node, rounding: Rounding, found: list[tuple[float, float]]
    ) -> Rounding:
        """Return `rounding`, which also adds to `found` how far it is from what the node yields."""

        def rounded(env: Env) -> Tensor:
            value = rounding(env)
            found.append(squares([value], [self.run_node(node)]))
            return value

        return rounded


def squares(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Return `sum (actual - expected)^2` and `sum expected^2`, in fp64."""
    lost = [(a.double() - e.double()).square().sum() for a, e in zip(actual, expected, strict=True)]
    total = [e.double().square().sum() for e in expected]
    return float(torch.stack(lost).sum()), float(torch.stack(total).sum())


def _last_readers(nodes: Sequence[Node], chosen: Sequence[Trial]) -> list[list[Node]]:
    """Return the values that nothing reads after each node, neither the program nor a trial."""
    last: dict[Node, int] = {}
    extra: dict[Node, set[Node]] = {}
    for trial in chosen:
        for node in trial.roundings:
            extra.setdefault(node, set()).update(trial.reads)
    for index, node in enumerate(nodes):
        for read in (node, *node.all_input_nodes, *extra.get(node, ())):
            last[read] = index
    dead: list[list[Node]] = [[] for _ in nodes]
    for node, index in last.items():
        dead[index].append(node)
    return dead
