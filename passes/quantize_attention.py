"""Replace float self-attention by 8-bit attention with calibrated per-head scales.

Law: rounding. q and k come out of a norm, so their range per head is known from calibration and a
static scale serves every call; the scales multiply back inside the logits and after the sum.

    before                                          after
                                                    %q8 = quantize_per_head(%q, q_scale, i8)
                                                    %k8 = quantize_per_head(%k, k_scale, i8)
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
from wancompile.quant.stats import Stats
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
        if self.recipe.attention is None:
            return
        nodes = match.by_site(draft.graph)
        groups = {group.key: group for group in draft.groups}
        for attention in draft.attentions:
            node = nodes[attention.site]
            reason = _obstacle(attention, node)
            if reason:
                draft.skip(attention.site, reason, node)
                continue
            self._rewrite(draft, attention, node, groups)

    def _rewrite(
        self, draft: Draft, attention: Attention, node: Node, groups: Mapping[Site, Group]
    ) -> None:
        operands = dict(zip("qkv", match.args(node)[:3], strict=True))
        amax = {name: self._amax(attention, name, value) for name, value in operands.items()}
        inverse = _value_inverse(draft, attention, groups)
        if inverse is not None:
            amax["v"] = amax["v"] * inverse.to(amax["v"].device).reshape(amax["v"].shape)
        qk = DTYPES[str(self.recipe.attention)]
        dtypes = {"q": qk, "k": qk, "v": FP8}
        device = match.val(node).device
        scales = []
        for operand in operands:
            scale = scale_of(amax[operand].amax(-1), dtypes[operand]).to(device)
            name = f"{attention.site}_{operand}_scale".replace("#", "_call_").replace(":", ".")
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

    def _amax(self, attention: Attention, operand: str, value: Node) -> torch.Tensor:
        stats = self.stats.heads.get((attention.site, operand)) if self.stats else None
        heads = (match.shape(value)[1], match.shape(value)[3])
        if stats is None or stats.amax.shape[1:] != heads:
            raise CalibrationError(
                "8-bit attention needs calibrated scales, and there are none for this site",
                site=str(attention.site),
                source=match.source_line(value),
            )
        return stats.amax.amax(0)


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
