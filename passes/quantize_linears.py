"""Replace the float linears of a group by one quantise op and 8-bit linears.

Law: rounding. `x ~ q(x) * scale(x)` per token and `W ~ q(W) * scale(W)` per output channel, so
`linear(x, W, b) ~ (q(x) @ q(W).T) * scale(x) * scale(W) + b`. A multiply by a stored vector right
before the group (a smooth scale that could not be folded) is taken up by the quantise op.

    before                                          after
    %xs = mul(%x, inv_s)                            %q, %s = quantize_per_token(%x, inv_s, i8)
    %a = linear(%xs, mul(Wa, s), ba)                %a = scaled_linear(%q, %s, Wa8, Wa_scale, ba)
    %b = linear(%xs, mul(Wb, s), bb)                %b = scaled_linear(%q, %s, Wb8, Wb_scale, bb)

Where the recipe says `activation="static"`, x has one scale in all calls, from calibration; what
lies outside of its range saturates:

                                                    %q = quantize_per_tensor(%x, inv_s, scale, i8)
                                                    %a = scaled_linear(%q, scale, Wa8, Wa_scale, ba)

Weights are quantized one at a time, from their fp32 product with all folded scales, and the
original is let go at once. Where the recipe wants ranges clipped or GPTQ, the weights of a group
are rounded together when its first linear comes; see `rounding.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.ir.site import Group, Site
from wancompile.passes.factors import Factors, located
from wancompile.passes.rounding import Rounder
from wancompile.quant.stats import Stats
from wancompile.recipe import QSpec, Recipe

aten = torch.ops.aten
ops = torch.ops.wancompile


@dataclass(frozen=True)
class QuantizeLinears:
    """Quantize every group that the recipe names.

    Weights are rounded on `device`, one group at a time at most, or where they are; what becomes of
    them is where they were. `stats` serve recipes that want more than rounding to nearest, or
    static scales, which without them is a CalibrationError.
    """

    recipe: Recipe
    stats: Stats | None = field(default=None, repr=False)
    device: torch.device | None = None

    name: ClassVar[str] = "quantize_linears"
    needs: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.QUANTIZED
    exact: ClassVar[bool] = False

    def apply(self, draft: Draft) -> None:
        """Collect the linears of all groups, then rewrite them in execution order."""
        nodes = match.by_site(draft.graph)
        rounder = Rounder(draft, self.stats, self.device)
        specs: dict[Node, QSpec] = {}
        scales: dict[Node, Tensor] = {}
        for group in draft.groups:
            found = dict(self._specs(draft, group, nodes))
            specs.update(found)
            for spec in set(found.values()):
                rounder.expect(group, list(found), spec)
                if spec.activation == "static":
                    scale = rounder.input_scale(group, next(iter(found)), spec)
                    scales.update(dict.fromkeys(found, scale))
        shared = _Shared(draft, rounder, scales)
        position = match.position(draft.graph)
        factors = Factors(draft)
        weights = {group.key: factors.of_group(group, nodes) for group in draft.groups}
        for node in sorted(specs, key=position.__getitem__):
            shared.quantize(node, specs[node])
        nodes = match.by_site(draft.graph)
        draft.groups = tuple(
            replace(
                group,
                rounding=rounder.chosen.get(group.key, group.rounding),
                weights=located(weights[group.key], nodes),
            )
            for group in draft.groups
        )

    def _specs(
        self, draft: Draft, group: Group, nodes: Mapping[Site, Node]
    ) -> Iterator[tuple[Node, QSpec]]:
        spec = self.recipe.spec_for(group)
        if spec is None:
            draft.skip(group.key, "the recipe leaves this group in floating point")
            return
        count = 0
        for node in (nodes[site] for site in group.sites):
            if not match.is_float_linear(node):
                continue
            if not match.reads_only_constants(match.args(node)[1]):
                draft.skip(node, "its weight is computed from the inputs", node)
                continue
            yield node, spec
            count += 1
        if count:
            by = ", input by a static scale" if spec.activation == "static" else ""
            draft.did(group.key, f"{group.role}: {count} linears in {spec.dtype}{by}")


@dataclass
class _Shared:
    """Quantizes linears; what several of them read is quantized once, for the first of them.

    `scales` are those of inputs that have one from calibration. `inputs` holds the 8-bit values and
    scales of (producer, name of 1/s, type, whether the scale is static), `weights` those of
    (weight, type). Linears have to come in execution order.
    """

    draft: Draft
    rounder: Rounder
    scales: Mapping[Node, Tensor]
    inputs: dict[tuple[Any, ...], tuple[Node, Node]] = field(default_factory=dict)
    weights: dict[tuple[Node, torch.dtype], tuple[Node, Node]] = field(default_factory=dict)

    def quantize(self, node: Node, spec: QSpec) -> None:
        """Replace a float linear by a `scaled_linear`."""
        weight: Any = match.args(node)[1]
        x, x_scale = self._input(node, spec)
        data, scale = self._weight(node, spec)
        bias, out = match.arg(node, 2, "bias"), match.val(node).dtype
        self.draft.replace_call(node, ops.scaled_linear.default, x, x_scale, data, scale, bias, out)
        _let_go(self.draft, weight)

    def _input(self, node: Node, spec: QSpec) -> tuple[Node, Node]:
        producer, inverse = take_up_scale(match.args(node)[0])
        name = str(inverse.target) if inverse is not None else ""
        key = (producer, name, spec.torch_dtype, node in self.scales)
        if key not in self.inputs:
            rounded = self._by_stored if node in self.scales else self._by_token
            self.inputs[key] = rounded(node, producer, inverse, spec.torch_dtype)
        return self.inputs[key]

    def _by_token(
        self, node: Node, x: Node, inverse: Node | None, dtype: torch.dtype
    ) -> tuple[Node, Node]:
        call = self.draft.call
        both = call(ops.quantize_per_token.default, x, inverse, dtype, before=node, like=node)
        q, scale = (call(operator.getitem, both, i, before=node, like=node) for i in (0, 1))
        return q, scale

    def _by_stored(
        self, node: Node, x: Node, inverse: Node | None, dtype: torch.dtype
    ) -> tuple[Node, Node]:
        name = f"static.{match.site(node)}".replace("#", "_call_")
        scale = self.draft.store(name, self.scales[node], before=node)
        target = ops.quantize_per_tensor.default
        return self.draft.call(target, x, inverse, scale, dtype, before=node, like=node), scale

    def _weight(self, node: Node, spec: QSpec) -> tuple[Node, Node]:
        key = (match.args(node)[1], spec.torch_dtype)
        if key not in self.weights:
            quantized = self.rounder.weight(node, spec)
            name, home = match.stored_name(match.args(node)[1]), match.val(node).device
            data = self.draft.store(f"{name}_{spec.dtype}", quantized.data.to(home), before=node)
            scale = self.draft.store(f"{name}_scale", quantized.scale.to(home), before=node)
            self.weights[key] = data, scale
        return self.weights[key]


def take_up_scale(x: Any) -> tuple[Node, Node | None]:
    """Return the value before a multiply by a stored vector over its channels, and the vector."""
    product = match.strip(x)
    if not match.is_op(product, aten.mul.Tensor):
        return x, None
    value, vector = match.operands(product)
    if not match.is_tensor(value) or not match.is_constant(vector):
        return x, None
    same = _is_like(value, x) and match.shape(vector) == match.shape(x)[-1:]
    return (value, vector) if same and match.val(vector).dtype == torch.float32 else (x, None)


def _is_like(value: Node, x: Node) -> bool:
    """Whether `value` has the type and the shape of `x`, so that no broadcast is lost with it."""
    if match.val(value).dtype != match.val(x).dtype or match.rank(value) != match.rank(x):
        return False
    return all(map(match.same, match.shape(value), match.shape(x)))


def _let_go(draft: Draft, weight: Node) -> None:
    """Erase a weight's expression if nothing reads it any more, and drop its tensors."""
    todo = [weight]
    while todo:
        node = todo.pop()
        if node.users or node._erased:
            continue
        todo.extend(node.all_input_nodes)
        draft.graph.erase_node(node)
        if node.op == "get_attr":
            draft.forget(str(node.target))
