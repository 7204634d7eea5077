"""Recognising gated residual sums; shared by the fusions. Reads only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from wancompile.ir import match

aten = torch.ops.aten


@dataclass(frozen=True)
class Residual:
    """`total = x + y * gate`, rounded to the type of `x`; `gate` is None where there is none."""

    x: Node
    y: Node
    gate: Node | None


def residual_of(total: Node) -> Residual | None:
    """Return the operands of a residual sum `[B, S, C]`."""
    added = match.narrowed_from(total)
    if not match.is_op(added, aten.add.Tensor) or match.rank(added) != 3:
        return None
    if added.kwargs:  # alpha scales an operand
        return None
    left, right = match.operands(added)
    if not match.is_tensor(left) or not match.is_tensor(right):
        return None
    gated = [one for one in (left, right) if _gate(one, total) is not None]
    branch = gated[-1] if gated else right
    x = match.widened_from(left if branch is right else right)
    y, gate = _gate(branch, total) or (match.widened_from(branch), None)
    shapes = [match.shape(one) for one in (x, y)]
    if match.val(x).dtype != match.val(total).dtype or not all(_same(s, total) for s in shapes):
        return None
    return Residual(x, y, gate)


def _gate(node: Node, total: Node) -> tuple[Node, Node] | None:
    """Return (y, gate) of a product of a branch and a modulation."""
    node = match.widened_from(node)
    if not match.is_op(node, aten.mul.Tensor):
        return None
    for y, gate in (match.operands(node), match.operands(node)[::-1]):
        if not match.is_tensor(y) or not _same(match.shape(y), total):
            continue
        if is_modulation(gate, match.shape(total)):
            return match.widened_from(y), gate
    return None


def is_modulation(node: Any, shape: torch.Size) -> bool:
    """Whether `node` is a float `[C]`, `[B, 1, C]` or, not made from a norm, `[B, S, C]`."""
    if not match.is_tensor(node) or not match.val(node).is_floating_point():
        return False
    if match.rank(node) not in (1, 3):
        return False
    found = match.shape(node)
    if not match.same(found[-1], shape[-1]):
        return False
    return len(found) == 1 or match.same(found[0], shape[0])


def is_outermost(node: Node) -> bool:
    """Whether `node` is a sum as others read it: rounded, if it is rounded before it is read."""
    if match.is_op(node, aten.to.dtype):
        source = match.args(node)[0]
        is_sum = match.is_op(source, aten.add.Tensor) and match.sole_reader(source) is node
        return is_sum and _rounds(node)
    reader = match.sole_reader(node)
    return reader is None or not _rounds(reader)


def _rounds(node: Node) -> bool:
    return match.is_op(node, aten.to.dtype) and match.widened_from(node) is node


def _same(shape: torch.Size, other: Node) -> bool:
    wanted = match.shape(other)
    return len(shape) == len(wanted) and all(map(match.same, shape, wanted))
