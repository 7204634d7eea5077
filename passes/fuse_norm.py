"""Make gate, residual, LayerNorm, modulation and rounding one op.

Law: `quantize(norm(x + y * gate) * weight + bias)` is one function of its operands. As one op only
the sum itself is rounded to the type of the stream, and a kernel passes over memory once.

    before                                          after
    %x1 = to(add(%x, mul(%y, %gate)), bf16)         %x1, %q, %s = residual_norm_quantize(
    %n = layer_norm(to(%x1, f32), [64], ...)            %x, %y, %gate, None,
    %m = to(add(mul(%n, %weight), %bias), bf16)         %weight, None, %bias, None, None, ...)
    %q, %s = quantize_per_token(%m, inv_s, i8)

Later readers of the sum read it from the op. Without a residual before the norm the op is
`norm_quantize`.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.passes.modulations import split
from wancompile.passes.residuals import is_modulation, residual_of

aten = torch.ops.aten
ops = torch.ops.wancompile


@dataclass(frozen=True)
class FuseNorm:
    """Fuse each quantise op with the norm behind it, and the residual sum behind that."""

    name: ClassVar[str] = "fuse_norm"
    needs: ClassVar[Level] = Level.FUSED
    gives: ClassVar[Level] = Level.FUSED
    exact: ClassVar[bool] = False

    def apply(self, draft: Draft) -> None:
        """Look behind every quantise op."""
        for node in match.nodes_of(draft.graph, ops.quantize_per_token.default):
            norm = _norm_behind(node)
            if norm is None:
                continue
            if not match.leads_only_to(norm.node, node):
                draft.skip(node, "something else reads the normed values, too", norm.node)
                continue
            _fuse(draft, node, norm)
        draft.sort()


@dataclass(frozen=True)
class _Norm:
    """A LayerNorm over channels of `x` `[B, S, C]`; weight and bias None where there is none."""

    node: Node
    x: Node
    weight: Node | None
    bias: Node | None
    eps: float


def _norm_behind(node: Node) -> _Norm | None:
    """Return the modulated norm that a quantise op reads."""
    value = match.narrowed_from(match.args(node)[0])
    value, bias = _peeled(value, aten.add.Tensor)
    value, weight = _peeled(value, aten.mul.Tensor)
    if not match.is_op(value, aten.layer_norm.default) or match.rank(value) != 3:
        return None
    given = match.arg(value, 2, "weight"), match.arg(value, 3, "bias")
    if given != (None, None):
        if (weight, bias) != (None, None):
            return None
        weight, bias = given
    if list(match.args(value)[1]) != [match.shape(value)[-1]]:
        return None
    x = match.widened_from(match.args(value)[0])
    return _Norm(value, x, weight, bias, float(match.arg(value, 4, "eps", 1e-5)))


def _peeled(value: Node, op: Any) -> tuple[Node, Node | None]:
    """Take a modulation off: the other operand, and the modulation if `value` has one."""
    if not match.is_op(value, op) or value.kwargs:  # alpha scales an operand
        return value, None
    for inner, outer in (match.operands(value), match.operands(value)[::-1]):
        if _is_normed(inner) and is_modulation(outer, match.shape(value)):
            return match.narrowed_from(inner), outer
    return value, None


def _is_normed(node: Any) -> bool:
    """Whether `node` is a LayerNorm, or a product with one."""
    if not match.is_tensor(node):
        return False
    node = match.narrowed_from(node)
    if match.is_op(node, aten.mul.Tensor):
        return any(_is_layer_norm(one) for one in match.operands(node))
    return _is_layer_norm(node)


def _is_layer_norm(node: Any) -> bool:
    return match.is_tensor(node) and match.is_op(match.narrowed_from(node), aten.layer_norm.default)


def _fuse(draft: Draft, node: Node, norm: _Norm) -> None:
    _, inv_smooth, dtype = match.args(node)
    residual = residual_of(norm.x)
    if residual is not None and _depends([norm.weight, norm.bias], norm.x):
        residual = None
    gate = residual.gate if residual is not None else None
    splits = [split(draft, one, node) for one in (gate, norm.weight, norm.bias)]
    gating, *modulating = ((one.value, one.offset) for one in splits)
    operands = [*itertools.chain(*modulating), None, norm.eps, inv_smooth, dtype]
    if residual is None:
        draft.did(node, f"norm rounds to {match.dtype_name(dtype)}")
        draft.replace_call(node, ops.norm_quantize.default, norm.x, *operands)
        return
    draft.did(node, f"residual, norm and modulation round to {match.dtype_name(dtype)}")
    _fuse_residual(draft, node, norm.x, [residual.x, residual.y, *gating, *operands])


def _fuse_residual(draft: Draft, node: Node, total: Node, operands: list[Any]) -> None:
    call = draft.call
    fused = call(ops.residual_norm_quantize.default, *operands, before=node, like=node)
    new_total, q, scale = (
        call(operator.getitem, fused, i, before=node, like=like)
        for i, like in ((0, total), (1, node), (2, node))
    )
    for reader in [one for one in node.users if match.is_getitem(one)]:
        draft.replace(reader, (q, scale)[match.args(reader)[1]])
    total.replace_all_uses_with(new_total)
    draft.graph.erase_node(node)


def _depends(operands: list[Node | None], total: Node) -> bool:
    """Whether some operand is computed from `total`.

    The order of nodes tells nothing here: until it is sorted, early ones may read late ones.
    """
    starts = [one for one in operands if one is not None]
    return total in match.backward(starts, lambda one: one is total)
