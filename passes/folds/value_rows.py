"""Fold 1/s into the rows of the value projections before an attention.

Law: attention is linear in v, channel by channel: `attention(q, k, v / s) = attention(q, k, v) / s`
for any per-channel s. So the smooth scale of the linear that reads the output of an attention, or
the sum of several, goes into the rows and the bias of *every* value projection behind that sum.

    before                                          after
    %v = linear(%x, Wv, bv)                         %v = linear(%x, mul(Wv, inv_s[:, None]),
    %o = attention(%q, %k, reshape(%v))                         mul(bv, inv_s))
    %y = reshape(%o)                                %y = reshape(attention(%q, %k, reshape(%v)))

Which output channel a row of Wv ends up in is proved by following the channel axis through every
reshape, permute and slice between the projection and the reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.passes.folds import channels

aten = torch.ops.aten

# Sums that branch again and again have exponentially many paths; real models have one or two.
_MOST_PATHS = 16


@dataclass(frozen=True)
class ValueRows:
    """The value projections behind a producer, each with the row its channel 0 comes from."""

    projections: tuple[tuple[Node, int], ...]


def find(producer: Node, members: set[Node]) -> ValueRows | str:
    """Return the fold, or why there is none."""
    paths = _paths_to_projections(producer)
    if paths is None:
        return "the producer is not made of attention outputs alone"
    on_path = {node for path in paths for node in path} | members
    width = int(match.shape(producer)[-1])
    projections = []
    for path in paths:
        linear = path[-1]
        for node in path[:-1]:
            if any(not _carries(reader, node, on_path) for reader in match.readers(node)):
                return f"{node.name} has another reader on the way"
        axis = channels.follow(list(reversed(path)))
        if isinstance(axis, str):
            return axis
        if axis.dims != (match.rank(producer) - 1,):
            return "the channels do not arrive as the last dimension"
        if _rows_read_elsewhere(linear, axis.offset, width, on_path):
            return f"{linear.name} is also read elsewhere"
        projections.append((linear, axis.offset))
    # Two attentions may read the same value rows, which are then scaled once.
    unique = tuple(dict.fromkeys(projections))
    if _overlap(unique, width):
        return "two value projections share some rows"
    return ValueRows(unique)


def _overlap(projections: Sequence[tuple[Node, int]], width: int) -> bool:
    return any(
        a is b and abs(first - second) < width
        for (a, first), (b, second) in combinations(projections, 2)
    )


def _carries(reader: Node, node: Node, on_path: set[Node]) -> bool:
    """Whether `reader` takes the values of `node` on towards the producer, and to nothing else."""
    # An attention on the way may read the same tensor as its query, key or mask too.
    others = [*match.args(reader)[:2], *match.args(reader)[3:]]
    return reader in on_path and not (match.is_attention(reader) and node in others)


def _paths_to_projections(producer: Node) -> list[list[Node]] | None:
    """Return, per value projection, the nodes from `producer` back to the linear, inclusive."""
    paths: list[list[Node]] = []
    todo: list[list[Node]] = [[producer]]
    while todo:
        if len(paths) + len(todo) > _MOST_PATHS:
            return None
        path = todo.pop()
        node = path[-1]
        parents = _value_operands(node)
        if parents is None:
            return None
        for parent in parents:
            longer = [*path, parent]
            if not match.is_float_linear(parent):
                todo.append(longer)
            elif not any(match.is_attention(one) for one in path):
                return None
            else:
                paths.append(longer)
    return paths


def _value_operands(node: Node) -> list[Node] | None:
    if match.is_attention(node):
        return [match.args(node)[2]]
    if match.is_op(node, aten.add.Tensor):
        # A number that is added would have to be divided by s as well.
        both = match.operands(node)
        return list(both) if all(map(match.is_tensor, both)) else None
    if match.is_op(node, *match.LAYOUT_OPS, *match.CAST_OPS, aten.slice.Tensor):
        return [match.args(node)[0]]
    return None


def _rows_read_elsewhere(linear: Node, offset: int, width: int, on_path: set[Node]) -> bool:
    """Whether anything off the path reads rows [offset, offset + width) of `linear`."""
    for reader in match.readers(linear):
        if _carries(reader, linear, on_path):
            continue
        axis = channels.step(channels.of(linear), linear, reader)
        if not match.is_op(reader, aten.slice.Tensor) or axis is None:
            return True
        size = match.shape(reader)[-1]
        if not isinstance(size, int) or (
            axis.offset < offset + width and offset < axis.offset + size
        ):
            return True
    return False


def apply(draft: Draft, found: ValueRows, inverse: Node) -> None:
    """Multiply the rows and the bias of each projection by the stored fp32 `inverse` = 1/s."""
    for linear, offset in found.projections:
        rows = _padded(draft, inverse, linear, offset)
        column = draft.call(aten.unsqueeze.default, rows, 1, before=linear, like=linear)
        weight = draft.scaled(match.args(linear)[1], column, before=linear)
        bias = match.arg(linear, 2, "bias")
        if bias is not None:
            bias = draft.scaled(bias, rows, before=linear)
        draft.set_args(linear, (match.args(linear)[0], weight, bias))


def _padded(draft: Draft, inverse: Node, linear: Node, offset: int) -> Node:
    """Return 1/s for every row of the linear: ones for rows that are not value rows."""
    total, width = int(match.shape(linear)[-1]), int(match.shape(inverse)[0])
    if total == width:
        return inverse
    pads = [offset, total - offset - width]
    return draft.call(aten.constant_pad_nd.default, inverse, pads, 1.0, before=linear, like=linear)
