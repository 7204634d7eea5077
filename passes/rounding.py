"""What a group is rounded to, chosen before the first of its weights is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from wancompile.errors import CalibrationError, NumericsError
from wancompile.ir import edit, match
from wancompile.ir.edit import Draft
from wancompile.ir.site import Group, Rounding, Site
from wancompile.passes.smooth import stats_of
from wancompile.quant.judge import different, few
from wancompile.quant.numerics import QTensor, quantize_weight, scale_of
from wancompile.quant.rounding import FEWEST, choose_rounding
from wancompile.quant.stats import Stats
from wancompile.recipe import QSpec


class Rounder:
    """Rounds weights to nearest, or better where a recipe asks for it and calibration agrees.

    The weights of one group are on `device` at a time, or where they are.

    Attributes:
        chosen: how each group for which something was tried is rounded, by its key.
    """

    def __init__(self, draft: Draft, stats: Stats | None, device: torch.device | None) -> None:
        self.chosen: dict[Site, Rounding] = {}
        self._draft = draft
        self._stats = stats
        self._device = device
        # Looked up now: a scale that was folded into weights goes with the last of them.
        self._inverses = {
            group.key: draft.state[group.smoothing.inverse]
            for group in draft.groups
            if group.smoothing is not None and group.smoothing.inverse in draft.state
        }
        self._waiting: dict[Node, tuple[Group, list[Node], QSpec]] = {}
        self._rounded: dict[Node, QTensor] = {}

    def expect(self, group: Group, members: list[Node], spec: QSpec) -> None:
        """Announce linears that read one value; the first one asked for decides for all."""
        if members and (spec.clip or spec.rounding != "nearest"):
            self._waiting.update(dict.fromkeys(members, (group, members, spec)))

    def input_scale(self, group: Group, node: Node, spec: QSpec) -> Tensor:
        """Return `input_scale` of a group of which `node` is a linear."""
        inverse = self._inverses.get(group.key)
        return input_scale(self._stats, group, node, inverse, spec.torch_dtype)

    def weight(self, node: Node, spec: QSpec) -> QTensor:
        """Return the weight of a linear in 8 bits.

        Raises:
            NumericsError: it holds NaN or infinity.
        """
        if node in self._waiting:
            self._choose(*self._waiting[node])
        found = self._rounded.pop(match.args(node)[1], None)
        if found is not None:
            return found
        try:
            return quantize_weight(self._evaluated(match.args(node)[1]), spec.torch_dtype)
        except NumericsError as error:
            site, source = str(match.site(node)), match.source_line(node)
            raise NumericsError(error.reason, site=site, source=source) from error

    def _choose(self, group: Group, members: list[Node], spec: QSpec) -> None:
        for node in members:
            del self._waiting[node]
        reason = self._obstacle(members)
        if reason or self._stats is None:
            self._draft.skip(group.key, reason, members[0])
            return
        weights = list(dict.fromkeys(match.args(node)[1] for node in members))
        stacked = torch.cat([self._evaluated(weight) for weight in weights])
        tokens = self._tokens(self._stats, group, members[0]).to(stacked.device)
        gptq = spec.rounding == "gptq"
        with suppress(NumericsError):  # rounding to nearest says which weight is broken
            found = choose_rounding(stacked, tokens, spec.torch_dtype, clip=spec.clip, gptq=gptq)
            if found is None:
                count = len(different(tokens))
                self._draft.skip(group.key, few(count, "judge rounding", FEWEST))
                return
            self.chosen[group.key] = found.how
            self._rounded.update(zip(weights, _parts(found.weight, weights), strict=True))
            self._report(group, found.how)

    def _obstacle(self, members: list[Node]) -> str:
        if self._stats is None:
            return "without statistics weights are rounded to nearest"
        readers = {user for node in members for user in match.args(node)[1].users}
        if any(match.is_float_linear(one) and one not in members for one in readers):
            return "a weight of the group is used more than once"
        return ""

    def _tokens(self, stats: Stats, group: Group, node: Node) -> Tensor:
        """Return sampled inputs of the group as they are once it is smoothed, `[R, K]` fp32."""
        tokens = stats_of(stats, group, node).tokens.float()
        inverse = self._inverses.get(group.key)
        return tokens if inverse is None else tokens * inverse.to(tokens.device)

    def _evaluated(self, weight: Node) -> Tensor:
        return edit.evaluate_constant(weight, self._draft.state, device=self._device)

    def _report(self, group: Group, how: Rounding) -> None:
        before = how.error_nearest
        tried: tuple[tuple[str, float | None, str], ...] = (
            (f"clipping ranges to {how.ratio:.2f}", how.error_clipped, how.clip_refusal),
            ("GPTQ", how.error_gptq, how.gptq_refusal),
        )
        for name, error, refused in tried:
            if error is None:
                continue
            if refused:
                self._draft.skip(group.key, f"{name.partition(' ')[0]} {refused}")
                continue
            self._draft.did(group.key, f"{name}: error / {before / max(error, 1e-30):.2f}")
            before = error


def input_scale(
    stats: Stats | None, group: Group, node: Node, inverse: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the scale `[1]` fp32 that holds the largest magnitude of what a group reads.

    Args:
        stats: what calibration has seen.
        group: read by it before it was smoothed.
        node: one of its linears, on whose device the scale will be.
        inverse: `[K]` fp32, what smoothing has multiplied the channels by, or None.
        dtype: int8 or e4m3.

    Raises:
        CalibrationError: there are no statistics, or they are of another model.
    """
    if stats is None:
        raise CalibrationError(
            "a static scale of activations needs calibration data or statistics",
            site=str(group.key),
            source=match.source_line(node),
        )
    amax = stats_of(stats, group, node).amax.amax(0)
    smoothed = amax if inverse is None else amax * inverse.to(amax.device)
    return scale_of(smoothed.amax(), dtype).reshape(1).to(match.val(node).device)


def _parts(whole: QTensor, weights: Sequence[Any]) -> list[QTensor]:
    """Cut a weight into those that it was stacked from; copies, so that each can go by itself."""
    sizes = [match.shape(weight)[0] for weight in weights]
    pieces = zip(torch.split(whole.data, sizes), torch.split(whole.scale, sizes), strict=True)
    return [QTensor(data.clone(), scale.clone()) for data, scale in pieces]
