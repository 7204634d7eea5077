"""Taking per-token modulations apart into what changes between tokens and what does not.

Law: `slice(T + E) + 1 = slice(E) + (slice(T) + 1)`: with T a stored table, the second term is a
constant per channel. The sum `[B, S, 6, C]` in fp32, the largest tensor of a model with a timestep
per token, is then never made: kernels read E as it is and add the constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft

aten = torch.ops.aten


@dataclass(frozen=True)
class Split:
    """A modulation as `value + offset`, of which `value` is one place of a larger tensor."""

    value: Node | None
    offset: Node | None = None


def split(draft: Draft, node: Node | None, before: Node) -> Split:
    """Return a modulation in two terms if it is a slice of a sum with a stored table."""
    if node is None or not is_per_token(node):
        return Split(node)
    found = _cut(node)
    if found is None:
        return Split(node)
    dim, index = found.dim, found.index
    table = draft.state[str(found.table.target)]
    offset = table.select(dim - match.rank(found.base), index).reshape(-1).to(torch.float32)
    name = f"offset.{found.table.target}"
    stored = draft.store(name, offset + found.number, before=before)
    end = index + 1
    cut = draft.call(aten.slice.Tensor, found.base, dim, index, end, before=before, like=node)
    value = draft.call(aten.squeeze.dim, cut, dim, before=before, like=node)
    return Split(value, stored)


@dataclass(frozen=True)
class _Cut:
    """`(table + base)[index of dim] + number`."""

    table: Node
    base: Node
    dim: int
    index: int
    number: float


def _cut(node: Node) -> _Cut | None:
    number = 0.0
    if match.is_op(node, aten.add.Tensor) and not node.kwargs:
        left, right = match.operands(node)
        given = match.constant_number(right)
        if given is None or not match.is_tensor(left):
            return None
        node, number = left, given
    place = place_of(node)
    if place is None:
        return None
    whole, dim, index = place
    if not match.is_op(whole, aten.add.Tensor) or match.rank(whole) != 4 or whole.kwargs:
        return None
    for table, base in (match.operands(whole), match.operands(whole)[::-1]):
        if match.is_constant(table) and match.is_tensor(base) and _is_table(table, whole, dim):
            base = match.widened_from(base)
            sizes = zip(match.shape(base), match.shape(whole), strict=True)
            if match.rank(base) == 4 and all(match.same(*pair) for pair in sizes):
                places = match.shape(whole)[dim]
                return _Cut(table, base, dim, match.dim_of(index, places), number)
    return None


def place_of(node: Node) -> tuple[Node, int, int] | None:
    """Return (x, dim, index) where `node` is one place of `x` along `dim`, without that dim."""
    if match.is_op(node, aten.select.int):
        whole, dim, index = match.args(node)
        return whole, match.dim_of(dim, match.rank(whole)), index
    if not match.is_op(node, aten.squeeze.dim, aten.squeeze.dims):
        return None
    cut, dims = match.args(node)
    (dim,) = dims if isinstance(dims, (list, tuple)) else (dims,)
    if not match.is_op(cut, aten.slice.Tensor):
        return None
    whole = match.args(cut)[0]
    cut_dim, start, end = (
        match.arg(cut, i, n, 0) for i, n in enumerate(("dim", "start", "end"), 1)
    )
    rank = match.rank(whole)
    same_dim = match.dim_of(cut_dim, rank) == match.dim_of(dim, rank)
    is_one = isinstance(start, int) and isinstance(end, int) and end == start + 1
    return (whole, match.dim_of(dim, rank), start) if same_dim and is_one else None


def _is_table(table: Node, whole: Node, dim: int) -> bool:
    """Whether `table` has a row of channels for each place along `dim`, and nothing else."""
    shape: list[Any] = [1] * match.rank(whole)
    shape[dim], shape[-1] = match.shape(whole)[dim], match.shape(whole)[-1]
    found = [1] * (match.rank(whole) - match.rank(table)) + list(match.shape(table))
    return dim == match.rank(whole) - 2 and found == shape


def is_per_token(value: Node) -> bool:
    """Whether a modulation has a row for each token, not one for each video or for all."""
    return match.rank(value) == 3 and not match.same(match.shape(value)[1], 1)
