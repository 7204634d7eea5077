"""Replace the float linears of a group by one quantise op and 8-bit linears.

Law: rounding. `x ~ q(x) * scale(x)` per token and `W ~ q(W) * scale(W)` per output channel, so
`linear(x, W, b) ~ (q(x) @ q(W).T) * scale(x) * scale(W) + b`. A multiply by a stored vector right
before the group (a smooth scale that could not be folded) is taken up by the quantise op.

    before                                          after
    %xs = mul(%x, inv_s)                            %q, %s = quantize_per_token(%x, inv_s, i8)
    %a = linear(%xs, mul(Wa, s), ba)                %a = scaled_linear(%q, %s, Wa8, Wa_scale, ba)
    %b = linear(%xs, mul(Wb, s), bb)                %b = scaled_linear(%q, %s, Wb8, Wb_scale, bb)

Weights are quantized one at a time, from their fp32 product with all folded scales, and the
original is let go at once.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.errors import NumericsError
from wancompile.ir import edit, match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.ir.site import Group
from wancompile.quant.numerics import quantize_weight
from wancompile.recipe import QSpec, Recipe

aten = torch.ops.aten
ops = torch.ops.wancompile


@dataclass(frozen=True)
class _Key:
    """What decides whether two groups can share one quantised input."""

    producer: Node
    inverse: str
    dtype: torch.dtype


@dataclass(frozen=True)
class QuantizeLinears:
    """Quantize every group that the recipe names."""

    recipe: Recipe

    name: ClassVar[str] = "quantize_linears"
    needs: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.QUANTIZED
    exact: ClassVar[bool] = False

    def apply(self, draft: Draft) -> None:
        """Visit groups in execution order; inputs shared between groups are quantised once."""
        nodes = match.by_site(draft.graph)
        position = match.position(draft.graph)
        inputs: dict[_Key, tuple[Node, Node]] = {}
        for group in draft.groups:
            spec = self.recipe.spec_for(group)
            members = [node for site in group.sites if match.is_float_linear(node := nodes[site])]
            if spec is None:
                draft.skip(group.key, "the recipe leaves this group in floating point")
                continue
            members.sort(key=position.__getitem__)
            for node in members:
                x, scale = _quantized_input(draft, node, spec, inputs)
                _quantize(draft, node, spec, x, scale)
            if members:
                draft.did(group.key, _summary(group, spec))


def _summary(group: Group, spec: QSpec) -> str:
    return f"{group.role}: {len(group.sites)} linears in {spec.dtype}"


def _quantized_input(
    draft: Draft, node: Node, spec: QSpec, inputs: dict[_Key, tuple[Node, Node]]
) -> tuple[Node, Node]:
    producer, inverse = _take_up_scale(match.args(node)[0])
    name = str(inverse.target) if inverse is not None else ""
    key = _Key(producer, name, spec.torch_dtype)
    if key not in inputs:
        both = draft.call(
            ops.quantize_per_token.default,
            producer,
            inverse,
            spec.torch_dtype,
            before=node,
            like=node,
        )
        x, scale = (draft.call(operator.getitem, both, i, before=node, like=node) for i in (0, 1))
        inputs[key] = x, scale
    return inputs[key]


def _take_up_scale(x: Any) -> tuple[Node, Node | None]:
    """Return the value before a multiply by a stored vector over its channels, and the vector."""
    product = match.strip(x)
    if match.is_op(product, aten.mul.Tensor) and _same_dtype(product, x):
        value, vector = match.operands(product)
        if match.is_constant(vector) and tuple(match.shape(vector)) == (match.shape(x)[-1],):
            return value, vector
    return x, None


def _same_dtype(product: Node, x: Node) -> bool:
    value: Any = match.args(product)[0]
    return match.is_tensor(value) and match.val(value).dtype == match.val(x).dtype


def _quantize(draft: Draft, node: Node, spec: QSpec, x: Node, scale: Node) -> None:
    weight: Any = match.args(node)[1]
    name = str(match.site(node)).replace("#", "_call_")
    try:
        quantized = quantize_weight(edit.evaluate_constant(weight, draft.state), spec.torch_dtype)
    except NumericsError as error:
        raise NumericsError(error.reason, site=name, source=match.source_line(node)) from error
    data = draft.store(f"{name}.weight_{spec.dtype}", quantized.data, before=node)
    weight_scale = draft.store(f"{name}.weight_scale", quantized.scale, before=node)
    bias, out = match.arg(node, 2, "bias"), match.val(node).dtype
    draft.replace_call(node, ops.scaled_linear.default, x, scale, data, weight_scale, bias, out)
    _let_go(draft, weight)


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
