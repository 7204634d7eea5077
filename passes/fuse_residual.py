"""Make a gated residual sum one op where no norm follows that could take it.

Law: `x + y * gate` is one function of its operands, rounded once.

    before                                          after
    %g = mul(%y, %gate)
    %s = to(add(to(%x, f32), %g), bf16)             %s = add_gated(%x, %y, %gate, None, None)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.passes.modulations import split
from wancompile.passes.residuals import is_outermost, residual_of

aten = torch.ops.aten
ops = torch.ops.wancompile


@dataclass(frozen=True)
class FuseResidual:
    """Fuse the gated sums that are left; a sum without a gate is one op as it is."""

    name: ClassVar[str] = "fuse_residual"
    needs: ClassVar[Level] = Level.FUSED
    gives: ClassVar[Level] = Level.FUSED
    exact: ClassVar[bool] = False

    def apply(self, draft: Draft) -> None:
        """Look behind every cast to the stream's type, and at sums that need none."""
        for node in match.nodes_of(draft.graph, aten.to.dtype, aten.add.Tensor):
            if not is_outermost(node):
                continue
            residual = residual_of(node)
            if residual is None or residual.gate is None or _is_normed(residual.y):
                continue
            draft.did(node, "gate and residual in one op")
            gate = split(draft, residual.gate, node)
            operands = residual.x, residual.y, gate.value, gate.offset, None
            draft.replace_call(node, ops.add_gated.default, *operands)


def _is_normed(branch: Node) -> bool:
    """Whether the product is the modulation of a norm, to which its shift is added."""
    norms = aten.layer_norm.default, aten.rms_norm.default
    return match.is_op(match.narrowed_from(branch), *norms)
