"""Following the channels of a linear through what reads them. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node

from wancompile.ir import match

aten = torch.ops.aten


@dataclass(frozen=True)
class Axis:
    """The channel axis of a tensor: the dims that it spans, major first, and its first row."""

    dims: tuple[int, ...]
    offset: int = 0


def of(linear: Node) -> Axis:
    """Return the channel axis of a linear's output: its last dimension."""
    return Axis((match.rank(linear) - 1,))


def follow(path: Sequence[Node]) -> Axis | str:
    """Follow the channel axis from a linear's output along `path`, or say where it is lost."""
    axis = of(path[0])
    for before, node in pairwise(path):
        following = step(axis, before, node)
        if following is None:
            return f"the channels cannot be followed through {match.target_name(node)}"
        axis = following
    return axis


def step(axis: Axis, before: Node, node: Node) -> Axis | None:
    """Return where the channel axis of `before` lies in `node`, which reads it; None if unknown."""
    if match.is_op(node, *match.CAST_OPS, aten.add.Tensor):
        return axis if _spans_alike(axis, before, node) else None
    if match.is_attention(node):
        over_tokens = match.rank(node) - 2 in axis.dims
        # Readers of 1/s as [heads, head size] count on the channels of a head being neighbours.
        by_head = list(axis.dims) == sorted(axis.dims)
        return axis if by_head and not over_tokens and _spans_alike(axis, before, node) else None
    if match.is_op(node, aten.permute.default):
        order = [match.dim_of(dim, match.rank(node)) for dim in match.args(node)[1]]
        return Axis(tuple(order.index(dim) for dim in axis.dims), axis.offset)
    if match.is_op(node, aten.reshape.default):
        return _through_reshape(axis, node)
    if match.is_op(node, aten.slice.Tensor):
        return _through_slice(axis, node)
    return None


def _spans_alike(axis: Axis, before: Node, after: Node) -> bool:
    """Whether the axis is as wide after a call as before it: nothing was broadcast along it."""
    return match.rank(before) == match.rank(after) and all(
        match.same(match.shape(before)[dim], match.shape(after)[dim]) for dim in axis.dims
    )


def _through_reshape(axis: Axis, node: Node) -> Axis | None:
    """The dims before and after the axis stay; what lies between them is the axis, in order."""
    operand: Any = match.args(node)[0]
    before, after = match.shape(operand), match.shape(node)
    first, last = axis.dims[0], axis.dims[-1]
    if axis.dims != tuple(range(first, last + 1)):
        return None
    trailing = len(before) - 1 - last
    if len(after) - trailing <= first:
        return None
    kept = [(before[i], after[i]) for i in range(first)]
    kept += [(before[-i], after[-i]) for i in range(1, trailing + 1)]
    if not all(match.same(a, b) for a, b in kept):
        return None
    return Axis(tuple(range(first, len(after) - trailing)), axis.offset)


def _through_slice(axis: Axis, node: Node) -> Axis | None:
    dim = match.dim_of(match.arg(node, 1, "dim", 0), match.rank(node))
    if dim not in axis.dims:
        return axis
    size, start = match.shape(match.args(node)[0])[dim], match.arg(node, 2, "start") or 0
    if len(axis.dims) > 1 or match.arg(node, 4, "step", 1) != 1:
        return None
    if not (isinstance(start, int) and isinstance(size, int)):
        return None
    return Axis(axis.dims, axis.offset + (start if start >= 0 else max(start + size, 0)))
