"""Multiply by all weights that meet the same 8-bit input at once.

Law: the columns of a product do not depend on each other, `x [A; B]^T = [x A^T, x B^T]`, bit for
bit. One large product fills a GPU better than several small ones and reads x once.

    before                                          after
    %q = scaled_linear(%x, %s, Wq, sq, bq)          %all = scaled_linear(%x, %s, Wqkv, sqkv, bqkv)
    %k = scaled_linear(%x, %s, Wk, sk, bk)          %q = slice(%all, -1, 0, 64)
    %v = scaled_linear(%x, %s, Wv, sv, bv)          %k = slice(%all, -1, 64, 128) ...

The slices keep the sites of the linears they stand for. Linears of different groups stay apart even
where they read one value: the keys and values that all blocks make of one text would otherwise live
from the first block to the last.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.ir.site import Site, Weight

aten = torch.ops.aten
ops = torch.ops.wancompile


@dataclass(frozen=True)
class MergeLinears:
    """Concatenate the weights of 8-bit linears of one group with a common input."""

    name: ClassVar[str] = "merge_linears"
    needs: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.FUSED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Merge, in execution order, the linears of each input that are alike in kind."""
        groups = {site: group.key for group in draft.groups for site in group.sites}
        alike: dict[tuple[Any, ...], list[Node]] = defaultdict(list)
        for node in match.nodes_of(draft.graph, ops.scaled_linear.default):
            if all(match.is_constant(one) for one in _stored(node)):
                site = match.site(node)
                group = groups.get(site) if site is not None else None
                x, x_scale, weight, _, bias, out = match.args(node)
                kind = group, x, x_scale, match.val(weight).dtype, bias is None, out
                alike[kind].append(node)
        moved: dict[Site, tuple[str, str, int]] = {}
        for members in alike.values():
            if len(members) > 1:
                moved.update(_merge(draft, members))
        draft.groups = tuple(
            replace(group, weights=tuple(_moved(one, moved) for one in group.weights))
            for group in draft.groups
        )


def _moved(weight: Weight, moved: Mapping[Site, tuple[str, str, int]]) -> Weight:
    if weight.site not in moved:
        return weight
    data, scale, first = moved[weight.site]
    return replace(weight, data=data, scale=scale, first=first)


def _stored(node: Node) -> list[Any]:
    _, _, weight, scale, bias, _ = match.args(node)
    return [weight, scale] if bias is None else [weight, scale, bias]


def _merge(draft: Draft, members: Sequence[Node]) -> Iterator[tuple[Site, tuple[str, str, int]]]:
    """Merge; yield for each site where its weight and scale are now, and its first row there."""
    first = members[0]
    x, x_scale, *_, out_dtype = match.args(first)
    stored = [_joined(draft, parts, first) for parts in zip(*map(_stored, members), strict=True)]
    weight, scale, *rest = stored
    bias = rest[0] if rest else None
    both = draft.call(
        ops.scaled_linear.default, x, x_scale, weight, scale, bias, out_dtype,
        before=first, like=first,
    )  # fmt: skip
    draft.did(first, f"one product for {', '.join(str(match.site(node)) for node in members)}")
    start = 0
    for node in members:
        site, end = match.site(node), start + match.shape(node)[-1]
        if site is not None:
            yield site, (str(weight.target), str(scale.target), start)
        draft.replace_call(node, aten.slice.Tensor, both, -1, start, end)
        start = end


def _joined(draft: Draft, parts: Sequence[Node], before: Node) -> Node:
    """Store the parts one after the other; those that nothing else reads are dropped later."""
    tensors = [draft.state[str(part.target)] for part in parts]
    kind = functools.reduce(torch.promote_types, [one.dtype for one in tensors])
    name = f"merged.{parts[0].target}"
    return draft.store(name, torch.cat([one.to(kind) for one in tensors]), before=before)
