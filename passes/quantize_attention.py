"""Replace float self-attention by 8-bit attention.

Law: rounding. q and k come out of a norm, so their range per head is known from calibration and a
static scale serves every call; in int8 each query has its own scale, which costs nothing, as it is
a factor of a row of logits. The scales multiply back inside the logits and after the sum.

q and k are turned by an orthonormal matrix first, (q H) (k H)^T = q k^T (Ashkboos et al. 2024,
"QuaRot"), which spreads large channels over all and so halves the step. Heads whose size is no
power of two are not turned: they have no such matrix.

A vector subtracted from all keys adds the same number to all logits of a query, which softmax does
not see: softmax(q (k - c)^T) = softmax(q k^T). With c the middle of each channel's range, the range
of k - c is the narrowest there is, and the step of its 8 bits is proportional to it.

    before                                          after
                                                    %qh, %kh = hadamard(%q), hadamard(%k)
                                                    %q8, %s = quantize_per_token(%qh, None, i8)
                                                    %k8 = quantize_per_head(sub(%kh, c), t, i8)
    %o = attention(%q, %k, %v)                      %o = scaled_attention(%q8, %k8, %v, %s, t, ...)

The op rounds v itself, to e4m3 or bf16, since tensor cores want it in an order of their own.

Ranges are worth what they were seen on: with too few different tokens an attention is left alone.

Cross-attention stays as it is: over a few hundred text tokens it is 1.5 % of the work.
"""

from __future__ import annotations

import operator
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
from wancompile.ops.hadamard import has_hadamard
from wancompile.passes.smooth import stats_of as inputs_of
from wancompile.quant.head_scales import HeadScales
from wancompile.quant.judge import FEWEST, different, few
from wancompile.quant.stats import HeadStats, Stats
from wancompile.recipe import AttentionSpec, Recipe

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
        groups = {site: group for group in draft.groups for site in group.sites}
        for attention in draft.attentions:
            node, spec = nodes[attention.site], self.recipe.attention_for(attention.site)
            reason = obstacle(attention, node)
            if reason or spec is None:
                reason = reason or "the recipe leaves it in floating point"
                draft.skip(attention.site, reason, node)
                continue
            heads = stats_of(self.stats, attention, node)
            reason = too_few_tokens(self.stats, attention, nodes, groups)
            if reason:
                draft.skip(attention.site, reason, node)
                continue
            inverse = value_inverse(draft.state, attention, groups)
            found = HeadScales.of(heads, inverse, spec.torch_dtype)
            _Rewriting(draft, attention, node, spec).run(found)


@dataclass(frozen=True)
class _Rewriting:
    """Replaces one attention, all of whose new nodes come right before it."""

    draft: Draft
    attention: Attention
    node: Node
    spec: AttentionSpec

    def run(self, found: HeadScales) -> None:
        q, k, v = match.args(self.node)[:3]
        if is_turned(self.node):
            q, k = (self._call(ops.hadamard.default, one) for one in (q, k))
        if found.middle is not None:
            k = self._call(aten.sub.Tensor, k, self._stored("k_middle", found.middle))
        k_scale = self._stored("k_scale", found.k)
        q8, q_scale = self._queries(q, found)
        k8 = self._call(ops.quantize_per_head.default, k, k_scale, self.spec.torch_dtype)
        v_scale = self._stored("v_scale", found.v) if self.spec.rounds_values else None
        basis = ", turned" if is_turned(self.node) else ""
        self.draft.did(self.attention.site, f"{self.spec}{basis}")
        operands = (q8, k8, v, q_scale, k_scale, v_scale)
        last = softmax_scale(self.node), match.val(self.node).dtype
        self.draft.replace_call(self.node, ops.scaled_attention.default, *operands, *last)

    def _queries(self, q: Node, found: HeadScales) -> tuple[Node, Node]:
        """Return q in 8 bits and its scale."""
        dtype = self.spec.torch_dtype
        if not self.spec.scales_queries:
            scale = self._stored("q_scale", found.q)
            return self._call(ops.quantize_per_head.default, q, scale, dtype), scale
        both = self._call(ops.quantize_per_token.default, q, None, dtype)
        return self._call(operator.getitem, both, 0), self._call(operator.getitem, both, 1)

    def _call(self, target: Any, *args: Any) -> Node:
        return self.draft.call(target, *args, before=self.node, like=self.node)

    def _stored(self, part: str, tensor: torch.Tensor) -> Node:
        name = f"{self.attention.site}_{part}".replace("#", "_call_").replace(":", ".")
        return self.draft.store(name, tensor.to(match.val(self.node).device), before=self.node)


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


def too_few_tokens(
    stats: Stats | None,
    attention: Attention,
    nodes: Mapping[Site, Node],
    groups: Mapping[Site, Group],
) -> str:
    """Return why calibration saw too little for this self-attention; empty where it saw enough.

    What its ranges rest on are the tokens that its projections read; `groups` are by their sites.
    Raises `CalibrationError`
    where there are no statistics of them.
    """
    if stats is None:
        return ""  # `stats_of` says so
    tokens = inputs_of(stats, groups[attention.q], nodes[attention.q]).tokens
    seen = len(different(tokens))
    return "" if seen >= FEWEST else few(seen, "trust its ranges")


def is_turned(node: Node) -> bool:
    """Whether q and k of an attention are turned, when they are observed and when they round."""
    return has_hadamard(match.shape(match.args(node)[0])[-1])


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
