"""Spell every way of cutting and reshaping a tensor the same way.

Law: `view`, `flatten`, `unflatten` are `reshape`; `transpose`, `t`, `mT` are `permute`; `chunk`,
`split`, `unbind` yield slices of their operand; the `concat` aliases are `cat`.

    before                                          after
    %parts = chunk(%x, 2, -1)
    %a = getitem(%parts, 0)                         %a = slice(%x, 2, 0, 64)
    %b = getitem(%parts, 1)                         %b = slice(%x, 2, 64, 128)
    %c = unflatten(%a, 2, [4, -1])                  %c = reshape(%a, [%batch, %tokens, 4, 16])
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level

aten = torch.ops.aten

_RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
)
_TRANSPOSES = (
    aten.transpose.int,
    aten.t.default,
    aten.mT.default,
    aten.numpy_T.default,
    aten.adjoint.default,
    aten.swapaxes.default,
    aten.movedim.int,
)
_SPLITS = (
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.tensor_split.sections,
)
# How torch spells a slice to the end; 0 would be an empty one.
_LAST = sys.maxsize
_RENAMED: Mapping[Any, Any] = {
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.divide.Tensor: aten.div.Tensor,
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
}


@dataclass(frozen=True)
class Canonicalize:
    """Replace synonyms by one spelling each."""

    name: ClassVar[str] = "canonicalize"
    needs: ClassVar[Level] = Level.EXPORTED
    gives: ClassVar[Level] = Level.EXPORTED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Visit every call once, in order."""
        count = 0
        for node in list(draft.graph.nodes):
            rewrite = _rewrite_of(node)
            if rewrite is not None:
                rewrite(draft, node)
                count += 1
        if count:
            draft.did("graph", f"{count} calls respelled")


def _rewrite_of(node: Node) -> Callable[[Draft, Node], None] | None:
    if match.is_op(node, *_RESHAPES):
        return _reshape
    if match.is_op(node, *_TRANSPOSES):
        return _permute
    if match.is_op(node, *_SPLITS):
        return _split
    if match.is_op(node, aten.unbind.int):
        return _unbind
    if match.is_op(node, aten.narrow.default):
        return _narrow
    if match.is_op(node, aten.expand_as.default):
        return _expand_as
    if match.is_op(node, *_RENAMED):
        return _rename
    return None


def _rename(draft: Draft, node: Node) -> None:
    draft.replace_call(node, _RENAMED[node.target], *node.args, **node.kwargs)


def _reshape(draft: Draft, node: Node) -> None:
    operand: Any = match.args(node)[0]
    draft.replace_call(node, aten.reshape.default, operand, _sizes_asked_for(draft, node, operand))


def _sizes_asked_for(draft: Draft, node: Node, operand: Node) -> list[Any]:
    """Return the sizes that `node` reshapes to; one of them may be -1."""
    kept = _Sizes(draft, node, operand)
    ndim = match.rank(operand)
    if match.is_op(node, aten.flatten.using_ints):
        first = match.dim_of(match.arg(node, 1, "start_dim", 0), ndim)
        last = match.dim_of(match.arg(node, 2, "end_dim", -1), ndim)
        return [*kept.of(range(first)), -1, *kept.of(range(last + 1, ndim))]
    if match.is_op(node, aten.unflatten.int):
        dim = match.dim_of(match.args(node)[1], ndim)
        return [*kept.of(range(dim)), *match.args(node)[2], *kept.of(range(dim + 1, ndim))]
    if match.is_op(node, aten.view_as.default, aten.reshape_as.default):
        other: Any = match.args(node)[1]
        return _Sizes(draft, node, other).of(range(match.rank(other)))
    return list(match.args(node)[1])


@dataclass(frozen=True)
class _Sizes:
    """Spells sizes of a tensor: numbers where they are fixed, reads of the size where not."""

    draft: Draft
    at: Node
    tensor: Node

    def of(self, dims: Iterable[int]) -> list[Any]:
        return [self._size(dim) for dim in dims]

    def _size(self, dim: int) -> Any:
        size = match.shape(self.tensor)[dim]
        if isinstance(size, int):
            return size
        return self.draft.call(aten.sym_size.int, self.tensor, dim, before=self.at, like=self.at)


def _permute(draft: Draft, node: Node) -> None:
    operand: Any = match.args(node)[0]
    order = list(range(match.rank(operand)))
    if match.is_op(node, aten.movedim.int):
        source, target = (match.dim_of(d, len(order)) for d in match.args(node)[1:3])
        order.insert(target, order.pop(source))
    else:
        a, b = _swapped(node, len(order))
        order[a], order[b] = order[b], order[a]
    draft.replace_call(node, aten.permute.default, operand, order)


def _swapped(node: Node, ndim: int) -> tuple[int, int]:
    if len(node.args) == 3:
        return match.dim_of(match.args(node)[1], ndim), match.dim_of(match.args(node)[2], ndim)
    return (0, 0) if ndim < 2 else (ndim - 2, ndim - 1)


def _split(draft: Draft, node: Node) -> None:
    operand: Any = match.args(node)[0]
    dim = match.dim_of(match.arg(node, 2, "dim", 0), match.rank(operand))
    values: Sequence[torch.Tensor] = node.meta["val"]
    ends = _ends([value.shape[dim] for value in values])
    if ends is None:
        draft.skip(node, "the parts have dynamic sizes", node)
        return
    bounds = list(zip([0, *ends], ends, strict=False))
    _take_parts(draft, node, lambda index: (aten.slice.Tensor, operand, dim, *bounds[index]))


def _ends(sizes: Sequence[Any]) -> list[int] | None:
    if not all(isinstance(size, int) for size in sizes):
        return None
    return [sum(sizes[: index + 1]) for index in range(len(sizes))]


def _unbind(draft: Draft, node: Node) -> None:
    operand: Any = match.args(node)[0]
    dim = match.dim_of(match.arg(node, 1, "dim", 0), match.rank(operand))
    _take_parts(draft, node, lambda index: (aten.select.int, operand, dim, index))


def _take_parts(draft: Draft, node: Node, part: Callable[[int], tuple[Any, ...]]) -> None:
    """Replace each `getitem` of a multi-output call by the call that yields this part alone."""
    for item in list(node.users):
        if match.is_getitem(item):
            draft.replace_call(item, *part(int(match.args(item)[1])))


def _narrow(draft: Draft, node: Node) -> None:
    operand, dim, start, length = match.args(node)
    if isinstance(start, Node) or (start < 0 and isinstance(length, Node)):
        draft.skip(node, "narrow with a dynamic start", node)
        return
    end = _end(draft, node, start, length)
    draft.replace_call(node, aten.slice.Tensor, operand, dim, start, end)


def _end(draft: Draft, node: Node, start: int, length: int | Node) -> int | Node:
    """Return where a slice of `length` from `start` ends."""
    if isinstance(length, Node):
        return draft.call(operator.add, start, length, before=node, like=node) if start else length
    end = start + length
    return _LAST if start < 0 and end == 0 else end


def _expand_as(draft: Draft, node: Node) -> None:
    operand, other = match.args(node)[0], match.args(node)[1]
    sizes = _Sizes(draft, node, other).of(range(match.rank(node)))
    draft.replace_call(node, aten.expand.default, operand, sizes)
