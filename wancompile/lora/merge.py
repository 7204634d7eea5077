"""Weights rounded anew with a LoRA in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from wancompile.errors import LoraError
from wancompile.lora.adapter import Adapter, Factors
from wancompile.lora.places import Place, Places
from wancompile.program import Program
from wancompile.quant.numerics import QTensor, quantize_weight


def merge(
    program: Program,
    known: Places,
    adapter: Adapter,
    scale: float,
    reference: torch.nn.Module | None,
) -> Program:
    """Return a FUSED program whose weights are `W + scale B A`, those in 8 bits rounded to nearest.

    Args:
        program: it stays as it is; what is not touched is shared.
        known: its places.
        adapter: its paths are among `known`.
        scale: times the LoRA's own.
        reference: the original model, with the weights as they were before they were rounded.
            Without it what they were rounded to is taken, and rounded once more.

    Raises:
        LoraError: the reference has no such weight.
        NumericsError: a sum is infinite.
    """
    originals = {} if reference is None else reference.state_dict()
    state = dict(program.state)
    for path, factors in adapter.items():
        for place in known[path]:
            original = _original(originals, place) if reference and place.scale else None
            _add(state, place, factors, scale * factors.scale, original)
    return replace(program, state=state)


def _original(originals: Mapping[str, Tensor], place: Place) -> Tensor:
    found = originals.get(place.name)
    if found is None or found.shape != (place.rows, place.columns) or found.is_meta:
        raise LoraError(
            f"the reference is another model: it has no {place.name} "
            f"[{place.rows}, {place.columns}] with values"
        )
    return found


def _add(
    state: dict[str, Tensor], place: Place, factors: Factors, scale: float, original: Tensor | None
) -> None:
    """Replace the tensors of a place; the old ones, which other programs may read, stay."""
    weight = state[place.weight].clone()
    down, up = place.scaled(factors, state, weight.device)
    added = scale * (up @ down)
    if place.scale:
        found = quantize_weight(_before(state, place, original) + added, weight.dtype)
        scales = state[place.scale].clone()
        weight[place.span], scales[place.span] = found.data, found.scale
        state[place.scale] = scales
    else:
        weight[place.span] = (weight[place.span].float() + added).to(weight.dtype)
    state[place.weight] = weight
    if factors.bias is not None:
        bias = state[place.bias].clone()
        bias[place.span] += (scale * place.shifted(factors.bias, state, bias.device)).to(bias.dtype)
        state[place.bias] = bias


def _before(state: Mapping[str, Tensor], place: Place, original: Tensor | None) -> Tensor:
    """Return the weight without the LoRA, times its factors, in fp32."""
    stored = state[place.weight]
    if original is None:
        return QTensor(stored[place.span], state[place.scale][place.span]).dequantize()
    found = original.detach().to(stored.device).float()
    if place.inputs:
        found = found * state[place.inputs]
    return found * state[place.outputs][:, None] if place.outputs else found
