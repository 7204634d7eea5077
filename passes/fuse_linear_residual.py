"""Let an 8-bit linear add its output to the residual stream itself.

Law: `x + (A W^T + b) * gate` is one function of its operands. As one op the linear's output is
never rounded to 16 bits, nor written and read again.

    before                                          after
    %y = scaled_linear(%q, %s, W8, Ws, b, bf16)
    %g = mul(%y, %gate)
    %t = to(add(to(%x, f32), %g), bf16)             %t = scaled_linear_residual(%q, %s, W8, Ws, b,
                                                                                %x, %gate)

A gate with a row per token stays with the norm that follows. The op has no site: what it yields is
not the linear's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.passes.modulations import is_per_token
from wancompile.passes.residuals import Residual, is_outermost, residual_of

aten = torch.ops.aten
ops = torch.ops.wancompile


@dataclass(frozen=True)
class FuseLinearResidual:
    """Fuse each residual sum with the linear whose output it adds, if nothing else reads it."""

    name: ClassVar[str] = "fuse_linear_residual"
    needs: ClassVar[Level] = Level.FUSED
    gives: ClassVar[Level] = Level.FUSED
    exact: ClassVar[bool] = False

    def apply(self, draft: Draft) -> None:
        """Look behind every sum."""
        for node in match.nodes_of(draft.graph, aten.to.dtype, aten.add.Tensor):
            residual = residual_of(node) if is_outermost(node) else None
            found = _linear_in(residual) if residual is not None else None
            if found is None:
                continue
            linear, x, gate = found
            reason = _obstacle(linear, node, gate)
            if reason:
                draft.skip(linear, reason, node)
                continue
            draft.did(linear, "adds its output to the residual stream")
            *operands, _ = match.args(linear)
            draft.replace_call(node, ops.scaled_linear_residual.default, *operands, x, gate)


def _linear_in(residual: Residual) -> tuple[Node, Node, Node | None] | None:
    """Return (linear, x, gate); without a gate either operand of the sum's type may be x."""
    x, y, gate = residual.x, residual.y, residual.gate
    if match.is_op(y, ops.scaled_linear.default):
        return y, x, gate
    is_stream = gate is None and match.val(y).dtype == match.val(x).dtype
    return (x, y, None) if is_stream and match.is_op(x, ops.scaled_linear.default) else None


def _obstacle(linear: Node, total: Node, gate: Node | None) -> str:
    if gate is not None and is_per_token(gate):
        return "its gate has a row per token"
    if not match.leads_only_to(linear, total):
        return "something else reads its output"
    return ""
