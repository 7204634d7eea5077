"""Fold 1/s into the weight and bias of a norm.

Law: `norm(x) * w + b` divided by s is `norm(x) * (w / s) + b / s`, exactly.

    before                                          after
    %y = layer_norm(%x, [64], w, b, eps)            %y = layer_norm(%x, [64], mul(w, inv_s),
                                                                    mul(b, inv_s), eps)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.passes.folds.readers import foreign_reader

aten = torch.ops.aten

# Positions of weight and bias in the arguments of each norm.
_VECTORS: Mapping[Any, tuple[int, ...]] = {
    aten.layer_norm.default: (2, 3),
    aten.rms_norm.default: (2,),
}


@dataclass(frozen=True)
class Affine:
    """A norm with a stored weight; `vectors` are the argument positions that hold tensors."""

    norm: Node
    vectors: tuple[int, ...]


def read(producer: Any) -> Affine | None:
    """Return the affine norm that `producer` is, if it is one."""
    norm = match.strip(producer)
    if not match.is_op(norm, *_VECTORS) or len(norm.args) < 3 or match.args(norm)[2] is None:
        return None
    positions = tuple(
        p for p in _VECTORS[norm.target] if p < len(norm.args) and match.args(norm)[p]
    )
    return Affine(norm, positions)


def find(producer: Node, members: set[Node]) -> Affine | str:
    """Return the fold, or why there is none."""
    found = read(producer)
    if found is None:
        return "the producer is no norm with weights"
    foreign = foreign_reader(producer, members)
    if foreign is not None:
        return f"{foreign.name} reads the norm too"
    return found


def apply(draft: Draft, found: Affine, inverse: Node) -> None:
    """Multiply weight and bias by the stored fp32 vector `inverse` = 1/s."""
    args = list(match.args(found.norm))
    for position in found.vectors:
        args[position] = draft.scaled(args[position], inverse, before=found.norm)
    draft.set_args(found.norm, args)
