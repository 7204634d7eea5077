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
from wancompile.quant.numerics import FP8, scale_of
from wancompile.quant.stats import HeadStats, Stats
from wancompile.recipe import DTYPES, Recipe

aten = torch.ops.aten
ops = torch.ops.wancompile

_LEAST_GAIN = 0.05


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
        if self.recipe.attention is None:
            return
        nodes = match.by_site(draft.graph)
        groups = {group.key: group for group in draft.groups}
        for attention in draft.attentions:
            node = nodes[attention.site]
            reason = _obstacle(attention, node) or self._exception(attention)
            if reason:
                draft.skip(attention.site, reason, node)
                continue
            self._rewrite(draft, attention, node, groups)

    def _exception(self, attention: Attention) -> str:
        stays = self.recipe.attention_for(attention.site) is None
        return "the recipe leaves it in floating point" if stays else ""

    def _rewrite(
        self, draft: Draft, attention: Attention, node: Node, groups: Mapping[Site, Group]
    ) -> None:
        operands = dict(zip("qkv", match.args(node)[:3], strict=True))
        stats = {name: self._stats(attention, name, value) for name, value in operands.items()}
        amax = {name: one.amax for name, one in stats.items()}
        if _gains_by_centring(stats["k"]):
            amax["k"] = stats["k"].half_width
            operands["k"] = _centred(draft, attention, operands["k"], stats["k"].middle, node)
        inverse = _value_inverse(draft, attention, groups)
        if inverse is not None:
            amax["v"] = amax["v"] * inverse.to(amax["v"].device).reshape(amax["v"].shape)
        qk = DTYPES[str(self.recipe.attention)]
        dtypes = {"q": qk, "k": qk, "v": FP8}
        device = match.val(node).device
        scales = []
        for operand in operands:
            scale = scale_of(amax[operand].amax(-1), dtypes[operand]).to(device)
            name = _stored_name(attention, f"{operand}_scale")
            scales.append(draft.store(name, scale, before=node))
        rounded = [
            draft.call(
                ops.quantize_per_head.default, operands[one], scale, qk, before=node, like=node
            )
            for one, scale in zip("qk", scales, strict=False)
        ]
        draft.did(attention.site, f"q, k in {self.recipe.attention}, v in fp8")
        draft.replace_call(
            node,
            ops.scaled_attention.default,
            *rounded,
            operands["v"],
            *scales,
            _softmax_scale(node),
            match.val(node).dtype,
        )

    def _stats(self, attention: Attention, operand: str, value: Node) -> HeadStats:
        stats = self.stats.heads.get((attention.site, operand)) if self.stats else None
        heads = (match.shape(value)[1], match.shape(value)[3])
        if stats is None or stats.low.shape[1:] != heads:
            raise CalibrationError(
                "8-bit attention needs calibrated scales, and there are none for this site",
                site=str(attention.site),
                source=match.source_line(value),
            )
        return stats


def _stored_name(attention: Attention, part: str) -> str:
    return f"{attention.site}_{part}".replace("#", "_call_").replace(":", ".")


def _gains_by_centring(keys: HeadStats) -> bool:
    """Whether the mean step of the heads shrinks by more than the operation may cost."""
    narrowed = keys.half_width.amax(-1).mean() / keys.amax.amax(-1).mean().clamp_min(1e-30)
    return bool(narrowed < 1 - _LEAST_GAIN)


def _centred(
    draft: Draft, attention: Attention, keys: Node, middle: torch.Tensor, before: Node
) -> Node:
    value = middle[:, None].to(match.val(keys).device, torch.float32)
    stored = draft.store(_stored_name(attention, "k_middle"), value, before=before)
    return draft.call(aten.sub.Tensor, keys, stored, before=before, like=before)


def _obstacle(attention: Attention, node: Node) -> str:
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


def _value_inverse(
    draft: Draft, attention: Attention, groups: Mapping[Site, Group]
) -> torch.Tensor | None:
    """Return the 1/s `[H * D]` by which smoothing has scaled v since it was observed, if any."""
    group = groups.get(attention.out) if attention.out is not None else None
    if group is None or group.fold is not Fold.VALUE_ROWS:
        return None
    if group.smoothing is None or not group.smoothing.applied:
        return None
    return draft.state[group.smoothing.inverse]


def _softmax_scale(node: Node) -> float:
    given: Any = node.kwargs.get("scale")
    return float(given) if given is not None else float(match.shape(node)[-1]) ** -0.5
