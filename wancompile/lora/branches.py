"""The LoRAs that a compiled model has, and the program that computes with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from wancompile import passes, pipeline
from wancompile.hoist import holding
from wancompile.lora.adapter import Adapter, Factors
from wancompile.lora.places import Place, places
from wancompile.passes.add_low_rank import AddLowRank, Slot
from wancompile.program import Program

_STEP = 16  # tensor cores multiply as many directions at a time


@dataclass(frozen=True, eq=False)
class Lora:
    """An adapter whose paths are in the model, and how much of it is added."""

    adapter: Adapter
    scale: float


Loras = Mapping[str, Lora]


class Branches:
    """Room for LoRAs beside the linears of one FUSED program, made when the first one comes.

    Changing LoRAs is copying their factors into that room. Only where they need more of it, a
    higher rank or another linear, the program is lowered anew; nothing is exported or calibrated.

    Attributes:
        places: where the weights of the program are, by path.
        loras: what is loaded, by name.
    """

    def __init__(self, fused: Program) -> None:
        self.places = places(fused)
        self.loras: Loras = MappingProxyType({})
        self._slots: dict[str, Slot] = {}
        self._lowered: Program | None = None

    def load(
        self, fused: Program, loras: Loras, device: torch.device, dtype: torch.dtype
    ) -> Program | None:
        """Have these LoRAs and no others; return the program that computes with them.

        It is None where none of them adds anything. After an error, everything is as it was.

        Args:
            fused: the program that `places` are of.
            loras: by name, in the order in which they take their room.
            device: what the program is lowered for.
            dtype: what branches beside 8-bit linears are computed in.
        """
        is_idle = not any(lora.scale for lora in loras.values())
        lowered = None if is_idle else self._filled(fused, loras, device, dtype)
        self.loras = MappingProxyType(dict(loras))
        return lowered

    def hold(self, tensors: Mapping[str, Tensor]) -> Program | None:
        """Read these stored tensors, of the same numbers, in the place of those of that name.

        Returns:
            The program that `load` returns from now on, until there is more room.
        """
        if self._lowered is not None:
            self._lowered = holding(self._lowered, tensors)
        return self._lowered

    def _filled(
        self, fused: Program, loras: Loras, device: torch.device, dtype: torch.dtype
    ) -> Program:
        members = self._members(loras)
        slots = self._slots_for(loras, members)
        lowered = self._lowered if slots == self._slots else None
        if lowered is None:
            added = AddLowRank(tuple(slots.values()), dtype)
            lowered = pipeline.run(fused, (added, *passes.lowering(device)))
        # All of them before the first is written: whatever goes wrong has gone wrong by then.
        found = [
            (lowered.state[name], tensor.to(lowered.state[name].dtype))
            for slot in slots.values()
            for name, tensor in _contents(slot, members[slot.weight], loras, fused, device)
        ]
        for stored, tensor in found:
            stored.copy_(tensor)
        self._slots, self._lowered = slots, lowered
        return lowered

    def _members(self, loras: Loras) -> dict[str, list[tuple[str, Place]]]:
        """Return, for each stored weight that is added to, the linears whose weights are in it."""
        members: dict[str, list[tuple[str, Place]]] = defaultdict(list)
        for path in dict.fromkeys(path for lora in loras.values() for path in lora.adapter):
            for place in self.places[path]:
                members[place.weight].append((path, place))
        return members

    def _slots_for(
        self, loras: Loras, members: Mapping[str, list[tuple[str, Place]]]
    ) -> dict[str, Slot]:
        """Return slots for all that there has been, and for `loras`, those of scale 0 as well."""
        slots = dict(self._slots)
        for weight, found in members.items():
            used = [one for lora in loras.values() for one, _ in _used(lora, found)]
            rank = sum(factors.rank for factors in used)
            before = slots.get(weight, Slot(weight, 0))
            has_bias = any(factors.bias is not None for factors in used)
            most = max(before.rank, -(-rank // _STEP) * _STEP)
            bias = next((place.bias for _, place in found), "") if has_bias else ""
            slots[weight] = Slot(weight, most, before.bias or bias)
        return slots


def _used(lora: Lora, members: list[tuple[str, Place]]) -> Iterator[tuple[Factors, Place]]:
    """Yield what a LoRA adds to the weights in a stored tensor."""
    for path, place in members:
        factors = lora.adapter.get(path)
        if factors is not None:
            yield factors, place


def _contents(
    slot: Slot,
    members: list[tuple[str, Place]],
    loras: Loras,
    fused: Program,
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored tensors of a slot by name, in fp32: the factors of all LoRAs side by side.

    Where several weights are in one tensor, B is zero outside of the rows of each.
    """
    state = fused.state
    rows, columns = state[slot.weight].shape
    down, up = (
        torch.zeros(slot.rank, columns, device=device),
        torch.zeros(rows, slot.rank, device=device),
    )
    shift = torch.zeros(rows, device=device)
    first = 0
    for lora in (one for one in loras.values() if one.scale):
        for factors, place in _used(lora, members):
            directions = slice(first, first + factors.rank)
            first += factors.rank
            scale = lora.scale * factors.scale
            down[directions], b = place.scaled(factors, state, device)
            up[place.span, directions] = scale * b
            if factors.bias is not None:
                shift[place.span] += scale * place.shifted(factors.bias, state, device)
    yield slot.down, down
    yield slot.up, up
    if slot.bias:
        yield slot.shift, shift + state[slot.bias].to(device)
