"""Raise every product with a stored weight to `linear`.

Law: `matmul(x, permute(W))`, `mm`, `addmm` and a following addition of a stored vector are
`linear(x, W, b)` when `W [N, K]` and `b [N]` are stored tensors.

    before                                          after
    %t = permute(weight, [1, 0])
    %m = matmul(%x, %t)
    %y = add(%m, bias)                              %y = linear(%x, weight, bias)
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


@dataclass(frozen=True)
class RaiseLinear:
    """Replace products with a transposed stored matrix by `linear`, bias included."""

    name: ClassVar[str] = "raise_linear"
    needs: ClassVar[Level] = Level.EXPORTED
    gives: ClassVar[Level] = Level.EXPORTED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Raise products first, then take up the biases that follow linears without one."""
        for node in match.nodes_of(draft.graph, aten.matmul.default, aten.mm.default):
            weight = _transposed_weight(match.args(node)[1])
            if weight is not None:
                draft.did(str(weight.target), "matmul became linear")
                draft.replace_call(node, aten.linear.default, match.args(node)[0], weight, None)
        for node in match.nodes_of(draft.graph, aten.addmm.default):
            bias, x, right = node.args
            weight = _transposed_weight(right)
            if weight is not None and _is_bias(bias, node) and not node.kwargs:
                draft.did(str(weight.target), "addmm became linear")
                draft.replace_call(node, aten.linear.default, x, weight, bias)
        for node in match.nodes_of(draft.graph, aten.linear.default):
            if match.arg(node, 2, "bias") is None:
                _take_bias(draft, node)


def _transposed_weight(node: Any) -> Node | None:
    """Return the stored matrix [N, K] of which `node` is the transpose."""
    if not match.is_op(node, aten.permute.default) or list(match.args(node)[1]) != [1, 0]:
        return None
    return match.args(node)[0] if match.is_constant(match.args(node)[0]) else None


def _is_bias(node: Any, product: Node) -> bool:
    return match.is_constant(node) and tuple(match.shape(node)) == (match.shape(product)[-1],)


def _take_bias(draft: Draft, node: Node) -> None:
    reader = match.sole_reader(node)
    if reader is None or not match.is_op(reader, aten.add.Tensor) or reader.kwargs:
        return
    pair = match.either(reader, lambda operand: operand is node)
    if pair is None or not _is_bias(pair[1], node):
        return
    draft.replace_call(
        reader, aten.linear.default, match.args(node)[0], match.args(node)[1], pair[1]
    )
