"""Replace float self-attention by 8-bit attention with calibrated per-head scales.

Law: rounding. q and k come out of a norm, so their range per head is known from calibration and a
static scale serves every call; the scales multiply back inside the logits and after the sum.

A vector subtracted from all keys adds the same number to all logits of a query, which softmax does
not see: softmax(q (k - c)^T) = softmax(q k^T). With c the middle of each channel's range, the range
of k - c is the narrowest there is, and the step of its 8 bits is proportional to it.

    before                                          after
                                                    %q8 = quantize_per_head(%q, q_scale, i8)
                                                    %k8 = quantize_per_head(sub(%k, c), k_scale, i8)
    %o = attention(%q, %k, %v)                      %o = scaled_attention(%q8, %k8, %v, ...)

The op rounds v itself, since tensor cores want it in an order of their own.

Cross-attention stays as it is: over a few hundred text tokens it is 1.5 % of the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.errors import CalibrationError
from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.ir.site import Attention, Fold, Group, Site
from wancompile.quant.head_scales import HeadScales
from wancompile.quant.stats import HeadStats, Stats
from wancompile.recipe import DTYPES, Recipe

aten = torch.ops.aten
ops = torch.ops.wancompile


@dataclass(frozen=True)
class QuantizeAttention:
    """Quantize every self-attention if the recipe asks for it; needs calibration."""

    recipe: Recipe
    stats: Stats | None = field(default=None, repr=False)

    name: ClassVar[str] = "quantize_attention"
    needs: ClassVar[Level] = Level.NORMAL
    gives: ClassVar[Level] = Level.QUANTIZED
    exact: ClassVar[bool] = False

    def apply(self, draft: Draft) -> None:
        """Visit every attention; say why one stays in floating point."""
        if not self.recipe.rounds_attention:
            return
        nodes = match.by_site(draft.graph)
        groups = {group.key: group for group in draft.groups}
        for attention in draft.attentions:
            node, dtype = nodes[attention.site], self.recipe.attention_for(attention.site)
            reason = obstacle(attention, node)
            if reason or dtype is None:
                reason = reason or "the recipe leaves it in floating point"
                draft.skip(attention.site, reason, node)
                continue
            inverse = value_inverse(draft.state, attention, groups)
            self._rewrite(draft, attention, node, inverse, dtype)

    def _rewrite(
        self,
        draft: Draft,
        attention: Attention,
        node: Node,
        v_inverse: torch.Tensor | None,
        dtype: str,
    ) -> None:
        found = HeadScales.of(stats_of(self.stats, attention, node), v_inverse, DTYPES[dtype])
        operands = dict(zip("qkv", match.args(node)[:3], strict=True))
        if found.middle is not None:
            operands["k"] = _centred(draft, attention, operands["k"], found.middle, node)
        device = match.val(node).device
        scales = [
            draft.store(_stored_name(attention, f"{operand}_scale"), one.to(device), before=node)
            for operand, one in zip("qkv", (found.q, found.k, found.v), strict=True)
        ]
        to_8_bits = ops.quantize_per_head.default
        rounded = [
            draft.call(to_8_bits, operands[one], scale, DTYPES[dtype], before=node, like=node)
            for one, scale in zip("qk", scales, strict=False)
        ]
        draft.did(attention.site, f"q, k in {dtype}, v in fp8")
        draft.replace_call(
            node,
            ops.scaled_attention.default,
            *rounded,
            operands["v"],
            *scales,
            softmax_scale(node),
            match.val(node).dtype,
        )


def stats_of(stats: Stats | None, attention: Attention, node: Node) -> dict[str, HeadStats]:
    """Return the statistics of q, k and v; raise `CalibrationError` where there are none."""
    found = {}
    for operand, value in zip("qkv", match.args(node)[:3], strict=True):
        one = stats.heads.get((attention.site, operand)) if stats else None
        heads = (match.shape(value)[1], match.shape(value)[3])
        if one is None or one.low.shape[1:] != heads:
            raise CalibrationError(
                "8-bit attention needs calibrated scales, and there are none for this site",
                site=str(attention.site),
                source=match.source_line(value),
            )
        found[operand] = one
    return found


def _stored_name(attention: Attention, part: str) -> str:
    return f"{attention.site}_{part}".replace("#", "_call_").replace(":", ".")


def _centred(
    draft: Draft, attention: Attention, keys: Node, middle: torch.Tensor, before: Node
) -> Node:
    value = middle.to(match.val(keys).device)
    stored = draft.store(_stored_name(attention, "k_middle"), value, before=before)
    return draft.call(aten.sub.Tensor, keys, stored, before=before, like=before)


def obstacle(attention: Attention, node: Node) -> str:
    """Return why this attention cannot be in 8 bits; empty where it can."""
    if not attention.is_self:
        return "cross-attention stays in floating point"
    if match.rank(node) != 4:
        return f"its operands have {match.rank(node)} dimensions, not [B, H, S, D]"
    if _more_than_softmax(node):
        return "it has a mask, dropout or causality"
    if not _alike(*match.args(node)[:3]):
        return "q, k and v differ in heads or head size"
    return ""


def _more_than_softmax(node: Node) -> bool:
    given = (
        match.arg(node, 3, "attn_mask"),
        match.arg(node, 4, "dropout_p"),
        match.arg(node, 5, "is_causal"),
    )
    return any(isinstance(one, Node) or bool(one) for one in given)


def _alike(q: Node, k: Node, v: Node) -> bool:
    """Whether all operands agree in batch, heads and head size."""
    return all(
        match.same(match.shape(q)[dim], match.shape(other)[dim])
        for other in (k, v)
        for dim in (0, 1, 3)
    )


def value_inverse(
    state: Mapping[str, torch.Tensor], attention: Attention, groups: Mapping[Site, Group]
) -> torch.Tensor | None:
    """Return the 1/s `[H * D]` by which smoothing has scaled v since it was observed, if any."""
    group = groups.get(attention.out) if attention.out is not None else None
    if group is None or group.fold is not Fold.VALUE_ROWS:
        return None
    if group.smoothing is None or not group.smoothing.applied:
        return None
    return state[group.smoothing.inverse]


def softmax_scale(node: Node) -> float:
    """Return the factor of the logits."""
    given: Any = node.kwargs.get("scale")
    return float(given) if given is not None else float(match.shape(node)[-1]) ** -0.5
