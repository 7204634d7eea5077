"""Read rows of a modulation that repeat from one place.

Law: where row s of a tensor equals row r, whoever reads row r instead of row s reads the same bits.
A timestep per token gives all tokens of one timestep one row: those of an image, and those of a
video. So a kernel reads one or two rows, which stay in cache, and not as many as there are tokens.

    before                                          after
                                                    %rows = repeated_rows(%embedded)
    %q, %s = norm_quantize(%x, %weight, %offset,    %q, %s = norm_quantize(%x, %weight, %offset,
        %bias, %offset_1, None, ...)                    %bias, %offset_1, %rows, ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.passes.modulations import is_per_token, place_of

ops = torch.ops.wancompile

_MODULATIONS = ("gate", "weight", "bias")


@dataclass(frozen=True)
class ShareRows:
    """Tell each op whose modulations are cut from one tensor which rows of it are the same."""

    name: ClassVar[str] = "share_rows"
    needs: ClassVar[Level] = Level.FUSED
    gives: ClassVar[Level] = Level.FUSED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Visit, in execution order, every op that may be told."""
        for node in match.nodes_of(
            draft.graph,
            ops.norm_quantize.default,
            ops.residual_norm_quantize.default,
            ops.add_gated.default,
        ):
            operands = _operands(node)
            varying = [name for name in _MODULATIONS if _varies(operands.get(name))]
            if not varying or operands["rows"] is not None:
                continue
            bases = {_base(operands, name) for name in varying}
            base = bases.pop() if len(bases) == 1 else None
            if base is None:
                draft.skip(node, "its modulations are not cut from one tensor beside tables", node)
                continue
            operands["rows"] = _rows(draft, base, node)
            draft.set_args(node, list(operands.values()))
            draft.did(node, "rows of the modulation that repeat are read from one place")


def _operands(node: Node) -> dict[str, Any]:
    names = [one.name for one in match.target(node)._schema.arguments]
    return dict(zip(names, match.args(node), strict=True))


def _varies(value: Any) -> bool:
    return match.is_tensor(value) and is_per_token(value)


def _base(operands: dict[str, Any], name: str) -> Node | None:
    """Return the tensor that a modulation is cut from, if it is the sum of that and a table.

    Any other one was computed for its reader alone: to compare its rows takes as long as to read
    them.
    """
    if operands[f"{name}_offset"] is None:
        return None
    place = place_of(operands[name])
    return None if place is None else place[0]


def _rows(draft: Draft, base: Node, before: Node) -> Node:
    """Return the repeated rows of `base`; all its readers share them."""
    known = (one for one in base.users if match.is_op(one, ops.repeated_rows.default))
    found = next(known, None)
    if found is not None:
        return found
    return draft.call(ops.repeated_rows.default, base, before=before, like=base)
