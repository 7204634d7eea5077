"""Fold 1/s into the modulation of a norm.

Law: `n * g + h` divided by s is `n * (g / s) + h / s`, for any g and h, exactly.

    before                                          after
    %g = add(%scale, 1)                             %g = add(%scale, 1)
    %m = mul(%n, %g)                                %m = mul(%n, mul(%g, inv_s))
    %y = add(%m, %shift)                            %y = add(%m, mul(%shift, inv_s))

g and h hold one row per video, so the fold costs nothing. Where they hold a row per token it would
cost two passes over the activations, and the quantise op applies 1/s for free instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.passes.folds.readers import foreign_reader

aten = torch.ops.aten


@dataclass(frozen=True)
class Modulation:
    """`total = product + shift`, `product = normed * gain`; `total` is cast to the producer."""

    product: Node
    total: Node
    normed: Node
    gain: Node
    shift: Node


def read(producer: Any) -> Modulation | None:
    """Return the modulated norm that `producer` is, if it is one."""
    total = match.strip(producer)
    if not match.is_op(total, aten.add.Tensor) or total.kwargs:
        return None
    pair = match.either(total, _is_product_of_norm)
    if pair is None or not match.is_tensor(pair[1]):
        return None
    product, shift = pair
    normed = match.either(product, _is_plain_norm)
    if normed is None or not match.is_tensor(normed[1]):
        return None
    if product is shift or normed[0] is normed[1]:
        return None
    return Modulation(product, total, normed[0], normed[1], shift)


def _is_product_of_norm(node: Any) -> bool:
    return match.is_op(node, aten.mul.Tensor) and match.either(node, _is_plain_norm) is not None


def _is_plain_norm(node: Any) -> bool:
    return match.is_op(match.strip(node), aten.layer_norm.default, aten.rms_norm.default)


def find(producer: Node, members: set[Node]) -> Modulation | str:
    """Return the fold, or why there is none."""
    found = read(producer)
    if found is None:
        return "the producer is no modulated norm"
    foreign = foreign_reader(producer, members)
    if foreign is not None:
        return f"{foreign.name} reads the modulated norm too"
    if match.sole_reader(found.product) is None:
        return "the product of norm and gain has other readers"
    if not (_one_row(found.gain) and _one_row(found.shift)):
        return "the modulation has a row per token, so folding would cost more than it saves"
    return found


def _one_row(node: Node) -> bool:
    sizes = match.shape(node)
    return len(sizes) < 2 or sizes[-2] == 1


def apply(draft: Draft, found: Modulation, inverse: Node) -> None:
    """Multiply gain and shift by the stored fp32 vector `inverse` = 1/s."""
    gain = draft.scaled(found.gain, inverse, before=found.product)
    shift = draft.scaled(found.shift, inverse, before=found.total)
    draft.redirect(found.product, found.gain, gain)
    draft.redirect(found.total, found.shift, shift)
