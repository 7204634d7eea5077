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
_SOFTMAXES = (aten.softmax.int, aten._softmax.default)


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
        for softmax in match.nodes_of(draft.graph, *_SOFTMAXES):
            if match.dim_of(softmax.args[1], match.rank(softmax)) != match.rank(softmax) - 1:
                continue
            scores = _scores(softmax.args[0])
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
            return _Scores(node.args[0], node.args[1], scale)  # type: ignore[arg-type]
        step = _scalar_step(node)
        if step is None:
            return None
        node, factor = step
        scale *= factor
    return None


def _scalar_step(node: Node) -> tuple[Any, float] | None:
    if match.is_op(node, aten.to.dtype):
        return node.args[0], 1.0
    if match.is_op(node, aten.mul.Tensor, aten.mul.Scalar):
        pair = match.either(node, lambda operand: match.constant_number(operand) is not None)
        return None if pair is None else (pair[1], float(pair[0]))
    if match.is_op(node, aten.div.Tensor, aten.div.Scalar):
        divisor = match.constant_number(node.args[1])
        return None if not divisor else (node.args[0], 1.0 / divisor)
    return None


def _weighted_sum(softmax: Node) -> Node | None:
    reader = match.sole_reader(softmax)
    while match.is_op(reader, aten.to.dtype):
        reader = match.sole_reader(reader)  # type: ignore[arg-type]
    if not match.is_op(reader, *_PRODUCTS) or reader is None:
        return None
    left: Any = reader.args[0]
    return reader if match.strip(left) is softmax else None


def _rewrite(draft: Draft, softmax: Node, scores: _Scores, product: Node) -> None:
    v: Any = product.args[1]
    dtype = match.val(v).dtype
    q = _cast(draft, scores.q, dtype, product)
    k = _transpose(draft, scores.k_transposed, product)
    k = _cast(draft, k, dtype, product)
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


def _cast(draft: Draft, node: Node, dtype: torch.dtype, before: Node) -> Node:
    if match.val(node).dtype == dtype:
        return node
    return draft.call(aten.to.dtype, node, dtype, before=before, like=before)


def _transpose(draft: Draft, node: Node, before: Node) -> Node:
    """Swap the last two dimensions, cancelling a permute that did the same."""
    ndim = match.rank(node)
    swap = [*range(ndim - 2), ndim - 1, ndim - 2]
    if match.is_op(node, aten.permute.default):
        inner: Any = node.args[0]
        order = [match.dim_of(d, ndim) for d in node.args[1]]  # type: ignore[union-attr]
        composed = [order[d] for d in swap]
        if composed == list(range(ndim)):
            result: Node = inner
            return result
        return draft.call(aten.permute.default, inner, composed, before=before, like=before)
    return draft.call(aten.permute.default, node, swap, before=before, like=before)
