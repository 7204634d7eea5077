"""Compute once what only stored tensors decide.

Law: a pure op on constants is a constant. Folding left products of weights, biases and scales in
the graph; they are computed here, in fp32 and rounded once.

    before                                          after
    %w = mul(norm_weight, inv_s)
    %y = layer_norm(%x, [64], %w, ...)              %y = layer_norm(%x, [64], folded_0, ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from wancompile.ir import edit, match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level

aten = torch.ops.aten

# What folds insert. Slices of tables and the like would only be copied, so they stay.
_FOLDED = (
    aten.mul.Tensor,
    aten.to.dtype,
    aten.unsqueeze.default,
    aten.constant_pad_nd.default,
)


@dataclass(frozen=True)
class FoldConstants:
    """Replace products of stored tensors by their stored value."""

    name: ClassVar[str] = "fold_constants"
    needs: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.QUANTIZED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Fold the roots of constant trees; what is below them dies with them."""
        constant: set[Node] = set()
        for node in draft.graph.nodes:
            if match.is_constant(node) or _folds(node, constant):
                constant.add(node)
        for node in [n for n in draft.graph.nodes if n in constant and not match.is_constant(n)]:
            if all(reader in constant for reader in node.users):
                continue
            _fold(draft, node)


def _folds(node: Node, constant: set[Node]) -> bool:
    return match.is_op(node, *_FOLDED) and all(one in constant for one in node.all_input_nodes)


def _fold(draft: Draft, node: Node) -> None:
    dtype = match.val(node).dtype
    precise = torch.promote_types(dtype, torch.float32)
    value = edit.evaluate_constant(node, draft.state, dtype=precise).to(dtype)
    name = str(match.stored_name(node))
    stored = draft.store(f"folded.{name}", value.contiguous(), before=node)
    draft.did(name, "scale folded in")
    draft.replace(node, stored)
