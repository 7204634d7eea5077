"""Decide where the reciprocal of each group's smooth scale can go; nothing is rewritten yet.

Law: see the files in `folds/`; a place is taken only where the fold is exact for every reader.

    modulated norm    -> gain and shift of the modulation
    affine norm       -> weight and bias of the norm
    attention output  -> rows of all value projections behind it
    anything else     -> the quantise op, with the reason
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.ir.site import Fold, Group, Site, Source
from wancompile.passes.folds import affine, modulation, value_rows

_FINDERS: Mapping[Source, tuple[Fold, Callable[[Node, set[Node]], Any]]] = {
    Source.MODULATED_NORM: (Fold.MODULATION, modulation.find),
    Source.AFFINE_NORM: (Fold.AFFINE, affine.find),
    Source.ATTENTION: (Fold.VALUE_ROWS, value_rows.find),
}
_UNFOLDABLE: Mapping[Source, str] = {
    Source.TEXT: "all blocks share the text states",
    Source.IMAGE: "all blocks share the image states",
    Source.ACTIVATION: "nothing folds through the activation",
    Source.STREAM: "the residual stream has other readers",
}


@dataclass(frozen=True)
class ChooseFolds:
    """Set `fold` and `fold_reason` of every group."""

    name: ClassVar[str] = "choose_folds"
    needs: ClassVar[Level] = Level.EXPORTED
    gives: ClassVar[Level] = Level.NORMAL
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Try the one fold that each group's source allows."""
        nodes = match.by_site(draft.graph)
        readers = weight_readers(nodes)
        draft.groups = tuple(_chosen(group, nodes, readers) for group in draft.groups)


def weight_readers(nodes: Mapping[Site, Node]) -> Mapping[str, int]:
    """Return how many linears read each stored weight."""
    counts: dict[str, int] = {}
    for node in nodes.values():
        if match.is_float_linear(node) and match.is_constant(match.args(node)[1]):
            name = str(match.args(node)[1].target)
            counts[name] = counts.get(name, 0) + 1
    return counts


def _chosen(group: Group, nodes: Mapping[Site, Node], readers: Mapping[str, int]) -> Group:
    if group.source not in _FINDERS:
        return replace(group, fold=Fold.QUANTIZE, fold_reason=_UNFOLDABLE[group.source])
    fold, find = _FINDERS[group.source]
    members = {nodes[site] for site in group.sites}
    found = find(match.args(nodes[group.key])[0], members)
    if isinstance(found, str):
        return replace(group, fold=Fold.QUANTIZE, fold_reason=found)
    if isinstance(found, value_rows.ValueRows) and _shared(found, readers):
        reason = "a value projection's weight is used more than once"
        return replace(group, fold=Fold.QUANTIZE, fold_reason=reason)
    return replace(group, fold=fold)


def _shared(found: value_rows.ValueRows, readers: Mapping[str, int]) -> bool:
    return any(
        readers.get(str(getattr(match.args(linear)[1], "target", "")), 1) > 1
        for linear, _ in found.projections
    )
