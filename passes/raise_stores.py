"""Turn strided stores that fill a fresh buffer into one functional interleave.

Law: a buffer made by `empty_like`, written once at every offset 0..n-1 of stride n along one
dimension and only then read, holds the values of `stack(parts, dim + 1)` with the two dimensions
merged. Rotary embeddings are often written this way.

    before                                          after
    %buf = empty_like(%x)
    %even = slice(%buf, 3, 0, end, 2)
    copy_(%even, %a)
    %odd = slice(%buf, 3, 1, end, 2)                %s = stack([%a, %b], 4)
    copy_(%odd, %b)                                 %buf = reshape(%s, [...])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.errors import LevelError
from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level

aten = torch.ops.aten

_FRESH = (
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.empty.memory_format,
    aten.new_empty.default,
)
_END = 2**31  # "to the end": any bound beyond a dimension's size


@dataclass(frozen=True)
class _Store:
    view: Node
    write: Node
    dim: int
    offset: int
    stride: int
    value: Node


@dataclass(frozen=True)
class RaiseStores:
    """Replace in-place strided stores by `stack` and `reshape`."""

    name: ClassVar[str] = "raise_stores"
    needs: ClassVar[Level] = Level.EXPORTED
    gives: ClassVar[Level] = Level.EXPORTED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Rewrite every buffer that is filled through views; refuse what is not understood."""
        for buffer in match.nodes_of(draft.graph, *_FRESH):
            stores = _stores(buffer)
            if not stores:
                continue
            if not _fills(stores):
                raise LevelError(
                    "in-place stores do not fill the buffer in equal strides",
                    site=match.module_path(buffer) or None,
                    source=match.source_line(buffer),
                )
            _rewrite(draft, buffer, stores)


def _stores(buffer: Node) -> list[_Store]:
    found = []
    for view in match.readers(buffer):
        if not match.is_op(view, aten.slice.Tensor):
            continue
        for write in match.readers(view):
            if match.is_op(write, aten.copy_.default) and match.args(write)[0] is view:
                found.append(_store(buffer, view, write))
    return found


def _store(buffer: Node, view: Node, write: Node) -> _Store:
    value: Any = match.args(write)[1]
    return _Store(
        view=view,
        write=write,
        dim=match.dim_of(match.arg(view, 1, "dim", 0), match.rank(buffer)),
        offset=int(match.arg(view, 2, "start") or 0),
        stride=int(match.arg(view, 4, "step", 1)),
        value=value,
    )


def _fills(stores: list[_Store]) -> bool:
    stride = len(stores)
    return (
        len({store.dim for store in stores}) == 1
        and all(store.stride == stride for store in stores)
        and sorted(store.offset for store in stores) == list(range(stride))
        and all(int(match.arg(store.view, 3, "end", _END) or _END) >= _END for store in stores)
    )


def _rewrite(draft: Draft, buffer: Node, stores: list[_Store]) -> None:
    last = stores[-1].write
    dim, dtype = stores[0].dim, match.val(buffer).dtype
    parts = []
    for store in sorted(stores, key=lambda store: store.offset):
        parts.append(_as_stored(draft, store, dtype))
    stacked = draft.call(aten.stack.default, parts, dim + 1, before=last, like=buffer)
    sizes: list[Any] = [
        size
        if isinstance(size, int)
        else draft.call(aten.sym_size.int, parts[0], d, before=last, like=buffer)
        for d, size in enumerate(match.shape(buffer))
    ]
    filled = draft.call(aten.reshape.default, stacked, sizes, before=last, like=buffer)
    for store in stores:
        draft.graph.erase_node(store.write)
    for view in {store.view for store in stores}:
        if not view.users:
            draft.graph.erase_node(view)
    draft.did(buffer, f"{len(stores)} strided stores became one interleave")
    draft.replace(buffer, filled)


def _as_stored(draft: Draft, store: _Store, dtype: torch.dtype) -> Node:
    """`copy_` casts and broadcasts to its target; so does this."""
    value = store.value
    if match.val(value).dtype != dtype:
        value = draft.call(aten.to.dtype, value, dtype, before=store.write, like=store.write)
    return value
