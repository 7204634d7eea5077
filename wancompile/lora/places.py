"""Where in a program the weight of a linear is, by the path of the linear in the model."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wancompile.errors import LoraError
from wancompile.ir import match
from wancompile.ir.levels import Level
from wancompile.ir.site import Weight
from wancompile.lora.adapter import Adapter, Factors
from wancompile.passes.add_low_rank import LINEARS, bias_of, weight_of
from wancompile.program import Program

_NAMED = 4


@dataclass(frozen=True)
class Place:
    """Some rows of a stored tensor that are the weight `W [N, K]` of a linear.

    Invariants: `weight` names the tensor, rows `first` to `first + rows` of which hold
    `W * inputs * outputs[:, None]`, in 8 bits with scales in `scale`, or in floating point if that
    is empty. `inputs` and `outputs` name fp32 vectors, or nothing. `bias` names what the linears
    that read the tensor add, with a number for each of all rows. `name` is the weight in the model.
    """

    name: str
    weight: str
    rows: int
    columns: int
    scale: str = ""
    first: int = 0
    inputs: str = ""
    outputs: str = ""
    bias: str = ""

    def scaled(
        self, factors: Factors, state: Mapping[str, Tensor], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return A and B in fp32 on `device`, changed as the weight was."""
        down, up = (one.to(device).float() for one in (factors.down, factors.up))
        if self.inputs:
            down = down * state[self.inputs].to(device)
        if self.outputs:
            up = up * state[self.outputs].to(device)[:, None]
        return down, up

    def shifted(self, bias: Tensor, state: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """Return a bias `[N]` in fp32 on `device`, changed as that of the linear was."""
        shift = bias.to(device).float()
        return shift * state[self.outputs].to(device) if self.outputs else shift

    @property
    def span(self) -> slice:
        """The rows."""
        return slice(self.first, self.first + self.rows)


Places = Mapping[str, tuple[Place, ...]]


def places(program: Program) -> dict[str, tuple[Place, ...]]:
    """Return the places of every linear of a FUSED program by its path; most have one.

    A linear that is called in several contexts may have been stored once for each.
    """
    assert program.level is Level.FUSED
    found: dict[str, dict[Place, None]] = defaultdict(dict)
    for path, place in (*_quantized(program), *_float(program)):
        found[path][place] = None
    return {path: tuple(some) for path, some in found.items()}


def _quantized(program: Program) -> Iterator[tuple[str, Place]]:
    biases = {
        str(weight_of(node).target): bias_of(node)
        for node in match.nodes_of(program.graph, *LINEARS)
    }
    for group in program.groups:
        ends = _ends(program, group.weights)
        for one in group.weights:
            if not one.data:
                continue
            bias = biases.get(one.data)
            yield (
                one.site.path,
                Place(
                    one.name,
                    one.data,
                    ends[one] - one.first,
                    program.state[one.data].shape[1],
                    one.scale,
                    one.first,
                    one.inputs,
                    one.outputs,
                    str(bias.target) if match.is_constant(bias) else "",
                ),
            )


def _ends(program: Program, weights: tuple[Weight, ...]) -> dict[Weight, int]:
    """Return the row behind the last one of each weight."""
    ends = {}
    for one in (one for one in weights if one.data):
        later = [w.first for w in weights if w.data == one.data and w.first > one.first]
        ends[one] = min(later, default=program.state[one.data].shape[0])
    return ends


def _float(program: Program) -> Iterator[tuple[str, Place]]:
    outputs = {w.site: w.outputs for group in program.groups for w in group.weights}
    for node in filter(match.is_float_linear, program.graph.nodes):
        site, weight, bias = match.site(node), weight_of(node), bias_of(node)
        if site is None or not match.is_constant(weight):
            continue
        rows, columns = match.shape(weight)
        name = str(weight.target)
        yield (
            site.path,
            Place(
                name,
                name,
                int(rows),
                int(columns),
                outputs=outputs.get(site, ""),
                bias=str(bias.target) if match.is_constant(bias) else "",
            ),
        )


def fitting(adapter: Adapter, known: Places, *, strict: bool) -> dict[str, Factors]:
    """Return what of `adapter` is in the model.

    Raises:
        LoraError: a linear is not in the model (if not `strict`: no linear is), or has another
            shape there.
    """
    strange = [path for path in adapter if path not in known]
    if strange and (strict or len(strange) == len(adapter)):
        raise LoraError(_strangers(strange, len(adapter), sorted(known)))
    found = {path: factors for path, factors in adapter.items() if path in known}
    for path, factors in found.items():
        for place in known[path]:
            _check_shape(path, factors, place)
    return found


def _strangers(strange: list[str], count: int, known: list[str]) -> str:
    listed = ", ".join(strange[:_NAMED]) + (", ..." if len(strange) > _NAMED else "")
    near = difflib.get_close_matches(strange[0], known, n=3, cutoff=0.0)
    what = f"{len(strange)} of the {count} linears of this LoRA are"
    return f"{what} not in the model: {listed}; nearest to the first are {', '.join(near)}"


def _check_shape(path: str, factors: Factors, place: Place) -> None:
    ours = [place.rows, place.columns]
    theirs = [factors.up.shape[0], factors.down.shape[1]]
    if ours != theirs:
        raise LoraError(f"the LoRA is of another model: {path} is {ours} here and {theirs} there")
    if factors.bias is not None and not place.bias:
        raise LoraError(f"{path} has no stored bias that the one of the LoRA could be added to")
