"""Turn a store into a slice of a tensor into a concatenation that the later readers read.

Law: after `copy_(slice(x, d, i, j), v)`, whoever reads `x` finds `cat([x[:i], v, x[j:]], d)`.
Models add to a part of their tokens or frames this way. It runs before copies are dropped: a store
into a copy is none into the original.

    before                                          after
    %tail = slice(%x, 2, 1, end)                    %head = slice(%x, 2, 0, 1)
    copy_(%tail, %v)                                %y = cat([%head, %v], 2)
    %z = flatten(%x)                                %z = flatten(%y)
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level

aten = torch.ops.aten


@dataclass(frozen=True)
class _Store:
    """`write` puts `value` into `base[start:end]` along `dim`."""

    write: Node
    value: Node
    base: Node
    dim: int
    start: int
    end: int


@dataclass(frozen=True)
class RaiseSliceStores:
    """Replace stores into one contiguous part of a tensor by `cat`."""

    name: ClassVar[str] = "raise_slice_stores"
    needs: ClassVar[Level] = Level.EXPORTED
    gives: ClassVar[Level] = Level.EXPORTED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Visit every store once, in order; other stores are left to others."""
        for write in match.nodes_of(draft.graph, aten.copy_.default):
            store = _store(write)
            if store is None:
                continue
            order = match.position(draft.graph)
            reason = _obstacle(store, order)
            if reason is not None:
                draft.skip(write, reason, write)
                continue
            _rewrite(draft, store, order)
            draft.did(write, f"a store into a part of {store.base.name} became a cat")


def _store(write: Node) -> _Store | None:
    """Return what `write` does if its target is one cut, in steps of 1, out of a tensor."""
    view, value = match.args(write)[:2]
    cuts = []
    while match.is_op(view, aten.slice.Tensor):
        if not _takes_all(view):
            cuts.append(view)
        view = match.args(view)[0]
    if len(cuts) != 1 or match.arg(cuts[0], 4, "step", 1) != 1:
        return None
    start = match.arg(cuts[0], 2, "start") or 0
    end = match.arg(cuts[0], 3, "end", sys.maxsize)
    end = sys.maxsize if end is None else end
    if isinstance(start, Node) or isinstance(end, Node) or min(start, end) < 0:
        return None
    dim = match.dim_of(match.arg(cuts[0], 1, "dim", 0), match.rank(view))
    return _Store(write, value, view, dim, start, end)


def _takes_all(cut: Node) -> bool:
    before, after = match.shape(match.args(cut)[0]), match.shape(cut)
    return all(match.same(a, b) for a, b in zip(before, after, strict=True))


def _obstacle(store: _Store, order: Mapping[Node, int]) -> str | None:
    """Say why the store cannot become a value, or None."""
    base, target = store.base, match.args(store.write)[0]
    if base.op != "call_function" or _may_alias(base):
        return f"it writes to {base.name}, which others may hold too"
    if store.write.users:
        return "what the store returns is read"
    if not _same_shape(store.value, target):
        return "it stores a value of another shape"
    late = next(_late_readers(base, order, order[store.write]), None)
    if late is not None:
        return f"{late.name} reads through a view that is older than the store"
    return None


def _may_alias(node: Node) -> bool:
    """Whether the call may yield memory of its operand."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    return any(one.alias_info is not None for one in target._schema.returns)


def _same_shape(value: Node, target: Node) -> bool:
    a, b = match.shape(value), match.shape(target)
    return len(a) == len(b) and all(map(match.same, a, b))


def _late_readers(node: Node, order: Mapping[Node, int], time: int) -> Iterator[Node]:
    """Yield what reads, after `time`, a view of `node` that was made before."""
    for view in node.users:
        if _may_alias(view) and order[view] < time:
            yield from (reader for reader in match.readers(view) if order[reader] > time)
            yield from _late_readers(view, order, time)


def _rewrite(draft: Draft, store: _Store, order: Mapping[Node, int]) -> None:
    write, base, dim = store.write, store.base, store.dim
    parts: list[Any] = [draft.cast(store.value, match.val(base).dtype, before=write)]
    if store.start > 0:
        parts.insert(0, _part(draft, store, 0, store.start))
    if store.end < 2**31:
        parts.append(_part(draft, store, store.end, sys.maxsize))
    whole = draft.call(aten.cat.default, parts, dim, before=write, like=write)
    for reader in list(base.users):
        if order.get(reader, -1) > order[write]:
            draft.redirect(reader, base, whole)
    draft.graph.erase_node(write)


def _part(draft: Draft, store: _Store, start: int, end: int) -> Node:
    return draft.call(
        aten.slice.Tensor, store.base, store.dim, start, end, before=store.write, like=store.write
    )
