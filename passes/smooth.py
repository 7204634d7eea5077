"""Divide a group's input by a smooth scale s and multiply its weights by it, where that helps.

Law: `(x / s) @ (W * s).T = x @ W.T` for any s > 0 per input channel. Where s evens out channels of
very different size, both factors lose less in 8 bits. 1/s goes where `choose_folds` has proved a
place; elsewhere it becomes a multiply that the quantise op takes up.

    before                                          after (unfoldable group)
                                                    %xs = mul(%x, inv_s)
    %y = linear(%x, W, b)                           %y = linear(%xs, mul(W, s), b)

A scale is applied only where it lowers the error on tokens that did not choose it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.errors import CalibrationError
from wancompile.ir import edit, match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.ir.site import Fold, Group, Site, Smoothing
from wancompile.passes.choose_folds import weight_readers
from wancompile.passes.folds import affine, modulation, value_rows
from wancompile.quant.judge import different, few
from wancompile.quant.search import Candidate, Choice, Weights, choose
from wancompile.quant.stats import ChannelStats, Stats
from wancompile.recipe import Recipe

aten = torch.ops.aten

# Per place: how to find it again, and how to put 1/s there.
_FOLDS: Mapping[Fold, tuple[Callable[[Node, set[Node]], Any], Callable[[Draft, Any, Node], None]]]
_FOLDS = {
    Fold.MODULATION: (modulation.find, modulation.apply),
    Fold.AFFINE: (affine.find, affine.apply),
    Fold.VALUE_ROWS: (value_rows.find, value_rows.apply),
}


@dataclass(frozen=True)
class Smooth:
    """Search and apply one smooth scale per group that the recipe quantizes with smoothing.

    The search runs on `device`, or where the weights are; only one weight at a time moves there.
    """

    recipe: Recipe
    stats: Stats = field(repr=False)
    device: torch.device | None = None

    name: ClassVar[str] = "smooth"
    needs: ClassVar[Level] = Level.NORMAL
    gives: ClassVar[Level] = Level.NORMAL
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Choose every scale from the weights as they came, then rewrite group by group."""
        nodes = match.by_site(draft.graph)
        shared = {name for name, count in weight_readers(nodes).items() if count > 1}
        chosen = {group.key: self._choose(draft, group, nodes, shared) for group in draft.groups}
        draft.groups = tuple(_apply(draft, one, nodes, chosen[one.key]) for one in draft.groups)

    def _choose(
        self, draft: Draft, group: Group, nodes: Mapping[Site, Node], shared: set[str]
    ) -> tuple[Smoothing, Candidate | None] | None:
        spec = self.recipe.spec_for(group)
        if spec is None or group.smoothing is not None:
            return None
        members = [nodes[site] for site in group.sites]
        stats = stats_of(self.stats, group, members[0])
        weights = _weights(draft, members, self.device)
        device = weights.amax.device
        amax, tokens = stats.amax.amax(0).to(device), stats.tokens.to(device)
        choice = choose(amax, weights, tokens, spec.torch_dtype)
        if choice is None:
            count = len(different(tokens))
            draft.skip(group.key, few(count, "judge a scale"))
            return None
        reason = _obstacle(choice, spec.smooth, members, shared)
        if reason:
            draft.skip(group.key, reason, members[0])
        best = choice.best
        result = Smoothing(
            best.alpha,
            best.beta,
            choice.error_plain,
            choice.error_smoothed,
            span_x=best.span_x,
            span_w=best.span_w,
            refusal=reason,
        )
        return result, None if reason else best


def stats_of(stats: Stats, group: Group, node: Node) -> ChannelStats:
    """Return the statistics of what `group` reads; `node` is one of its linears.

    Raises:
        CalibrationError: there are none of that width.
    """
    found = stats.channels.get(group.observer)
    if found is None or found.amax.shape[-1] != match.shape(match.args(node)[0])[-1]:
        raise CalibrationError(
            "the statistics have nothing for this site: they are of another model",
            site=str(group.key),
            source=match.source_line(node),
        )
    return found


def _obstacle(choice: Choice, allowed: bool, members: list[Node], shared: set[str]) -> str:
    if not allowed:
        return "the recipe does not smooth this group"
    if not choice.helps:
        return f"smoothing {choice.refusal}"
    if any(str(getattr(match.args(node)[1], "target", "")) in shared for node in members):
        return "a weight of the group is used more than once"
    return ""


def _weights(draft: Draft, members: list[Node], device: torch.device | None) -> Weights:
    nodes = [match.args(node)[1] for node in members]
    outputs = sum(match.shape(node)[0] for node in nodes)
    values = (edit.evaluate_constant(node, draft.state, device=device) for node in nodes)
    return Weights.of(values, outputs)


def _apply(
    draft: Draft,
    group: Group,
    nodes: Mapping[Site, Node],
    chosen: tuple[Smoothing, Candidate | None] | None,
) -> Group:
    if chosen is None:
        return group
    smoothing, best = chosen
    if best is None:
        return replace(group, smoothing=smoothing)
    members = [nodes[site] for site in group.sites]
    name = f"smooth.{group.key}".replace("#", "_call_")
    top = next(iter(draft.graph.nodes))
    found = best.scale.to(match.val(members[0]).device)
    factor = draft.store(f"{name}.scale", found, before=top)
    inverse = draft.store(f"{name}.inverse", 1 / found, before=top)
    _divide_input(draft, group, members, inverse)
    for node in members:
        weight = draft.scaled(match.args(node)[1], factor, before=node)
        draft.set_args(node, (match.args(node)[0], weight, *match.args(node)[2:]))
    gain = smoothing.error_plain / max(smoothing.error_smoothed, 1e-30)
    scale = f"x {best.span_x} ^ {best.alpha:g} / w {best.span_w} ^ {best.beta:g}"
    draft.did(group.key, f"{scale}, error / {gain:.2f}, 1/s in the {group.fold}")
    return replace(group, smoothing=replace(smoothing, inverse=str(inverse.target)))


def _divide_input(draft: Draft, group: Group, members: list[Node], inverse: Node) -> None:
    producer: Any = members[0].args[0]
    if group.fold is Fold.QUANTIZE:
        scaled = draft.scaled(producer, inverse, before=members[0])
        for node in members:
            draft.redirect(node, producer, scaled)
        return
    find, fold = _FOLDS[group.fold]
    place = find(producer, set(members))
    assert not isinstance(place, str), f"choose_folds proved a place that is gone: {place}"
    fold(draft, place, inverse)
