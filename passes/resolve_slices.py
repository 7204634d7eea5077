"""Let a slice of a concatenation read the part it covers.

Law: `slice(cat([a, b], d), d, len(a), end)` is `b`, and likewise for every part whose bounds are
provably those of the slice. This is how the text and the image states that a model concatenates
once and cuts apart in every block are told from each other, whatever their lengths.

    before                                          after
    %c = cat([%image, %text], 1)
    %t = slice(%c, 1, %image_tokens, end)
    %k = linear(%t, weight, bias)                   %k = linear(%text, weight, bias)
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
class ResolveSlices:
    """Bypass `cat` where a slice is exactly one of its parts, and slices that cover everything."""

    name: ClassVar[str] = "resolve_slices"
    needs: ClassVar[Level] = Level.EXPORTED
    gives: ClassVar[Level] = Level.EXPORTED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Resolve each slice once, in order, so that slices of slices resolve too."""
        for node in match.nodes_of(draft.graph, aten.slice.Tensor):
            part = _covered(node)
            if part is not None:
                draft.did(node, f"slice reads {part.name} itself")
                draft.replace(node, part)


def _covered(node: Node) -> Node | None:
    if match.arg(node, 4, "step", 1) != 1:
        return None
    operand: Node = match.args(node)[0]
    dim = match.dim_of(match.arg(node, 1, "dim", 0), match.rank(operand))
    start, end = _bounds(node, match.shape(operand)[dim])
    if match.same(start, 0) and match.same(end, match.shape(operand)[dim]):
        return operand
    if not match.is_op(operand, aten.cat.default):
        return None
    if match.dim_of(match.arg(operand, 1, "dim", 0), match.rank(operand)) != dim:
        return None
    at: Any = 0
    for part in match.args(operand)[0]:
        stop = at + match.shape(part)[dim]
        if match.same(start, at) and match.same(end, stop):
            found: Node = part
            return found
        at = stop
    return None


def _bounds(node: Node, size: Any) -> tuple[Any, Any]:
    """Return the first index and the one past the last, negative and missing bounds resolved."""
    start = match.size_value(match.arg(node, 2, "start"))
    end = match.size_value(match.arg(node, 3, "end"))
    start = 0 if start is None else start
    # A bound past the end (torch prints "to the end" as a huge number) means the end.
    end = size if end is None or (isinstance(end, int) and end >= 2**31) else end
    if isinstance(start, int) and start < 0:
        start = size + start
    if isinstance(end, int) and end < 0:
        end = size + end
    return start, end
