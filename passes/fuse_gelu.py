"""Let the GELU before an 8-bit linear round its own output.

Law: `quantize(gelu(x))` is one function of x. As one op nothing is rounded to 16 bits in between,
and a kernel passes over memory once.

    before                                          after
    %g = gelu(%x, approximate="tanh")
    %q, %s = quantize_per_token(%g, inv_s, i8)      %q, %s = gelu_quantize(%x, "tanh", inv_s, i8)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level

aten = torch.ops.aten
ops = torch.ops.wancompile


@dataclass(frozen=True)
class FuseGelu:
    """Fuse each GELU whose only reader quantizes it."""

    name: ClassVar[str] = "fuse_gelu"
    needs: ClassVar[Level] = Level.FUSED
    gives: ClassVar[Level] = Level.FUSED
    exact: ClassVar[bool] = False

    def apply(self, draft: Draft) -> None:
        """Look behind every quantise op."""
        for node in match.nodes_of(draft.graph, ops.quantize_per_token.default):
            x, inv_smooth, dtype = match.args(node)
            gelu = match.narrowed_from(x)
            if not match.is_op(gelu, aten.gelu.default):
                continue
            if not match.leads_only_to(gelu, node):
                draft.skip(gelu, "something else reads the GELU, too", gelu)
                continue
            form = match.arg(gelu, 1, "approximate", "none")
            source = match.args(gelu)[0]
            draft.did(gelu, f"gelu ({form}) rounds to {match.dtype_name(dtype)}")
            draft.replace_call(node, ops.gelu_quantize.default, source, form, inv_smooth, dtype)
