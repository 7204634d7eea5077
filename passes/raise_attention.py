"""Raise attention written out as matmul, softmax, matmul to one op.

Law: `matmul(softmax(c * matmul(q, k^T)), v)` with the softmax over keys and a literal factor c is
scaled-dot-product attention with scale c; casts between the steps only round.

    before                                          after
    %s = matmul(%q, %kt)                            %k = permute(%kt, [0, 1, 3, 2])
    %d = mul(%s, 0.125)
    %p = softmax(%d, -1)
    %o = matmul(%p, %v)                             %o = attention(%q, %k, %v, scale=0.125)
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

_PRODUCTS = (aten.matmul.default, aten.bmm.default)


@dataclass(frozen=True)
class _Scores:
    q: Node
    k_transposed: Node
    scale: float


@dataclass(frozen=True)
class RaiseAttention:
    """Replace matmul-softmax-matmul by `scaled_dot_product_attention`."""

    name: ClassVar[str] = "raise_attention"
    needs: ClassVar[Level] = Level.EXPORTED
    gives: ClassVar[Level] = Level.EXPORTED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Try every softmax; say why one is not an attention."""
        for softmax in match.nodes_of(draft.graph, *match.SOFTMAX_OPS):
            if match.dim_of(match.args(softmax)[1], match.rank(softmax)) != match.rank(softmax) - 1:
                draft.skip(softmax, "it is not over the last dimension", softmax)
                continue
            scores = _scores(match.args(softmax)[0])
            if scores is None:
                draft.skip(softmax, "its operand is not a plain, scaled product", softmax)
                continue
            product = _weighted_sum(softmax)
            if product is None:
                draft.skip(softmax, "its result is not used for one weighted sum", softmax)
                continue
            _rewrite(draft, softmax, scores, product)


def _scores(node: Any) -> _Scores | None:
    scale = 1.0
    while isinstance(node, Node):
        if match.is_op(node, *_PRODUCTS):
            return _Scores(match.args(node)[0], match.args(node)[1], scale)
        if match.is_op(node, aten.baddbmm.default):
            return _scores_without_addend(node, scale)
        step = _scalar_step(node)
        if step is None:
            return None
        node, factor = step
        scale *= factor
    return None


def _scores_without_addend(node: Node, scale: float) -> _Scores | None:
    """`baddbmm(_, q, k^T, beta=0, alpha=c)` ignores its first operand."""
    if match.constant_number(match.arg(node, 3, "beta", 1)) != 0:
        return None
    factor = match.constant_number(match.arg(node, 4, "alpha", 1))
    _, q, k_transposed = match.args(node)[:3]
    return None if factor is None else _Scores(q, k_transposed, scale * factor)


def _scalar_step(node: Node) -> tuple[Any, float] | None:
    if match.is_op(node, aten.to.dtype):
        return match.args(node)[0], 1.0
    if match.is_op(node, aten.mul.Tensor, aten.mul.Scalar):
        pair = match.either(node, lambda operand: match.constant_number(operand) is not None)
        return None if pair is None else (pair[1], float(pair[0]))
    if match.is_op(node, aten.div.Tensor, aten.div.Scalar):
        divisor = match.constant_number(match.args(node)[1])
        return None if not divisor else (match.args(node)[0], 1.0 / divisor)
    return None


def _weighted_sum(softmax: Node) -> Node | None:
    reader = match.sole_reader(softmax)
    while match.is_op(reader, aten.to.dtype):
        reader = match.sole_reader(reader)
    if not match.is_op(reader, *_PRODUCTS) or reader is None:
        return None
    left: Any = match.args(reader)[0]
    return reader if match.strip(left) is softmax else None


def _rewrite(draft: Draft, softmax: Node, scores: _Scores, product: Node) -> None:
    v: Any = match.args(product)[1]
    dtype = match.val(v).dtype
    q = draft.cast(scores.q, dtype, before=product)
    k = _transpose(draft, scores.k_transposed, product)
    k = draft.cast(k, dtype, before=product)
    draft.did(softmax, "matmul-softmax-matmul became one attention")
    raised = draft.call(
        aten.scaled_dot_product_attention.default,
        q,
        k,
        v,
        scale=scores.scale,
        before=product,
        like=softmax,
    )
    draft.replace(product, raised)


def _transpose(draft: Draft, node: Node, before: Node) -> Node:
    """Swap the last two dimensions, cancelling a permute that did the same."""
    ndim = match.rank(node)
    swap = [*range(ndim - 2), ndim - 1, ndim - 2]
    if match.is_op(node, aten.permute.default):
        inner: Any = match.args(node)[0]
        order = [match.dim_of(d, ndim) for d in match.args(node)[1]]
        composed = [order[d] for d in swap]
        if composed == list(range(ndim)):
            result: Node = inner
            return result
        return draft.call(aten.permute.default, inner, composed, before=before, like=before)
    return draft.call(aten.permute.default, node, swap, before=before, like=before)
