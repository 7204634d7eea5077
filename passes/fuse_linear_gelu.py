"""Let the 8-bit linear before a GELU round what comes behind it, by a scale known beforehand.

Law: rounding by a scale that does not depend on the values rounds each value on its own, so it
commutes with cutting a product into tiles: `quantise(gelu(A W^T + b))` is one function, tile by
tile. As one op nothing of more than 8 bits is written to memory.

    before                                          after
    %y = scaled_linear(%q, %s, W8, Ws, b, bf16)
    %g = gelu(%y, approximate="tanh")
    %p = quantize_per_tensor(%g, inv_t, t, i8)      %p = linear_gelu_quantize(%q, %s, W8, Ws, b,
                                                                              "tanh", inv_t, t, i8)

A scale per token is known only when a whole row is: such a GELU is left to `fuse_gelu`. The op has
no site: what it yields is not the linear's output.
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
ops = torch.ops.wancompile


@dataclass(frozen=True)
class FuseLinearGelu:
    """Fuse each GELU between an 8-bit linear and a static scale, if nothing else reads either."""

    name: ClassVar[str] = "fuse_linear_gelu"
    needs: ClassVar[Level] = Level.FUSED
    gives: ClassVar[Level] = Level.FUSED
    exact: ClassVar[bool] = False

    def apply(self, draft: Draft) -> None:
        """Look behind every quantise op with a static scale."""
        for node in match.nodes_of(draft.graph, ops.quantize_per_tensor.default):
            x, inv_smooth, scale, dtype = match.args(node)
            gelu = match.narrowed_from(x)
            if not match.is_op(gelu, aten.gelu.default):
                continue
            linear = match.narrowed_from(match.args(gelu)[0])
            reason = _obstacle(linear, gelu, node)
            if reason:
                draft.skip(gelu, reason, gelu)
                continue
            draft.did(linear, f"rounds to {match.dtype_name(dtype)} what comes behind its GELU")
            *operands, _ = match.args(linear)
            form = match.arg(gelu, 1, "approximate", "none")
            target = ops.linear_gelu_quantize.default
            draft.replace_call(node, target, *operands, form, inv_smooth, scale, dtype)


def _obstacle(linear: Node, gelu: Node, last: Node) -> str:
    if not match.leads_only_to(gelu, last):
        return "something else reads the GELU, too"
    if not match.is_op(linear, ops.scaled_linear.default):
        return "what it reads is no linear in 8 bits"
    if not match.leads_only_to(linear, gelu):
        return "something else reads the linear before it, too"
    return ""


def between(node: Node) -> torch.dtype:
    """Return what the linear in a `linear_gelu_quantize` yields where it is an op of its own.

    That is the type of its bias, which is the model's, or fp32 if it has none.
    """
    bias = match.args(node)[4]
    return match.val(bias).dtype if bias is not None else torch.float32


def split(draft: Draft, node: Node, linear: Any, *operands: Any) -> None:
    """Make a `linear_gelu_quantize` three ops again, the first `linear(*operands)`."""
    _, form, inv_smooth, scale, dtype = match.args(node)[4:]
    y = draft.call(linear, *operands, before=node, like=node)
    active = draft.call(aten.gelu.default, y, approximate=form, before=node, like=node)
    draft.replace_call(node, ops.quantize_per_tensor.default, active, inv_smooth, scale, dtype)
