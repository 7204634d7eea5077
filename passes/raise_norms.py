"""Raise norms written by hand to `rms_norm` and `layer_norm`.

Law, over the last dimension: `x * rsqrt(mean(x^2) + eps) * w` is `rms_norm(x, w, eps)`, and
`(x - mean(x)) * rsqrt(var(x) + eps) * w + b`, with the biased variance, is
`layer_norm(x, w, b, eps)`.

    before                                          after
    %p = pow(%x, 2)
    %m = mean(%p, [-1], True)
    %e = add(%m, 1e-6)
    %r = rsqrt(%e)
    %n = mul(%x, %r)
    %y = mul(%n, weight)                            %y = rms_norm(%x, [64], weight, 1e-6)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level

aten = torch.ops.aten

_VARIANCES = (aten.var.correction, aten.var.dim)


@dataclass(frozen=True)
class _Norm:
    """`value` normalised: by its mean square, or also by its mean (`centred`)."""

    value: Node
    eps: float
    centred: bool


@dataclass(frozen=True)
class RaiseNorms:
    """Replace hand-written RMSNorm and LayerNorm over the last dimension."""

    name: ClassVar[str] = "raise_norms"
    needs: ClassVar[Level] = Level.EXPORTED
    gives: ClassVar[Level] = Level.EXPORTED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Find each product (or quotient) that normalises, then take up weight and bias."""
        for node in match.nodes_of(draft.graph, aten.mul.Tensor, aten.div.Tensor):
            norm = _norm(node)
            if norm is not None:
                _rewrite(draft, node, norm)


def _norm(node: Node) -> _Norm | None:
    for value, root in _factors(node):
        eps_of = _mean_square_plus_eps(root)
        if eps_of is None:
            continue
        spread, eps = eps_of
        if _is_mean_square(spread, value):
            centre = _centred_value(value)
            return _Norm(centre, eps, True) if centre is not None else _Norm(value, eps, False)
        centre = _centred_value(value)
        if centre is not None and _is_variance(spread, centre):
            return _Norm(centre, eps, True)
    return None


def _factors(node: Node) -> list[tuple[Node, Node]]:
    """Return the ways to read `node` as value times 1/root, as `(value, root argument)`."""
    left, right = match.operands(node)
    if match.is_op(node, aten.div.Tensor):
        return [(left, match.args(right)[0])] if match.is_op(right, aten.sqrt.default) else []
    pairs = ((left, right), (right, left))
    return [(value, match.args(root)[0]) for value, root in pairs if _is_rsqrt(root)]


def _is_rsqrt(node: Any) -> bool:
    if match.is_op(node, aten.rsqrt.default):
        return True
    return match.is_op(node, aten.pow.Tensor_Scalar) and match.args(node)[1] == -0.5


def _mean_square_plus_eps(node: Any) -> tuple[Node, float] | None:
    if not match.is_op(node, aten.add.Tensor, aten.add.Scalar):
        return None
    pair = match.either(node, lambda operand: match.constant_number(operand) is not None)
    return None if pair is None else (pair[1], float(pair[0]))


def _over_last_dim(node: Node, value: Any) -> bool:
    dims = match.arg(node, 1, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    keeps = bool(match.arg(node, 2 if node.target is aten.mean.dim else 9, "keepdim", False))
    return keeps and [match.dim_of(d, match.rank(value)) for d in dims] == [match.rank(value) - 1]


def _is_mean_square(node: Any, value: Node) -> bool:
    if not match.is_op(node, aten.mean.dim) or not _over_last_dim(node, value):
        return False
    square = match.args(node)[0]
    if match.is_op(square, aten.pow.Tensor_Scalar):
        return match.args(square)[1] == 2 and _same_value(match.args(square)[0], value)
    if match.is_op(square, aten.square.default):
        return _same_value(match.args(square)[0], value)
    return match.is_op(square, aten.mul.Tensor) and all(
        _same_value(operand, value) for operand in match.operands(square)
    )


def _same_value(a: Any, b: Node) -> bool:
    return isinstance(a, Node) and match.strip(a) is match.strip(b)


def _centred_value(node: Node) -> Node | None:
    """Return x where `node` is `x - mean(x)`."""
    if not match.is_op(node, aten.sub.Tensor):
        return None
    value, mean = match.operands(node)
    is_mean = match.is_op(mean, aten.mean.dim) and _over_last_dim(mean, value)
    return value if is_mean and _same_value(match.args(mean)[0], value) else None


def _is_variance(node: Any, value: Node) -> bool:
    if not match.is_op(node, *_VARIANCES) or not _same_value(match.args(node)[0], value):
        return False
    dims = match.arg(node, 1, "dim")
    last = [match.dim_of(d, match.rank(value)) for d in dims or []] == [match.rank(value) - 1]
    if node.target is aten.var.correction:
        biased = bool(node.kwargs.get("correction") == 0)
        return last and biased and bool(node.kwargs.get("keepdim", False))
    return last and not match.arg(node, 2, "unbiased", True) and bool(match.arg(node, 3, "keepdim"))


def _rewrite(draft: Draft, node: Node, norm: _Norm) -> None:
    width = match.shape(norm.value)[-1]
    weight, last = _vector_operand(node, node, aten.mul.Tensor)
    bias, end = (None, last)
    if norm.centred:
        bias, end = _vector_operand(last, last, aten.add.Tensor)
    dtype = match.val(norm.value).dtype
    weight = draft.cast(weight, dtype, before=end) if weight is not None else None
    bias = draft.cast(bias, dtype, before=end) if bias is not None else None
    if norm.centred:
        args: tuple[Any, ...] = (
            aten.layer_norm.default,
            norm.value,
            [width],
            weight,
            bias,
            norm.eps,
        )
    else:
        args = (aten.rms_norm.default, norm.value, [width], weight, norm.eps)
    raised = draft.call(*args, before=end, like=node)
    raised = draft.cast(raised, match.val(end).dtype, before=end)
    draft.did(node, f"a hand-written norm became {raised.name}")
    draft.replace(end, raised)


def _vector_operand(start: Node, end: Node, target: Any) -> tuple[Node | None, Node]:
    """Return the stored vector that the sole reader of `start` applies, and that reader."""
    reader = match.sole_reader(start)
    while match.is_op(reader, aten.to.dtype):
        reader = match.sole_reader(reader)
    if reader is None or not match.is_op(reader, target) or reader.kwargs:
        return None, end
    pair = match.either(reader, lambda operand: _is_vector(operand, match.shape(start)[-1]))
    return (pair[0], reader) if pair is not None else (None, end)


def _is_vector(node: Any, width: Any) -> bool:
    if not isinstance(node, Node) or not match.is_constant(match.strip(node)):
        return False
    return tuple(match.shape(node)) == (width,)
