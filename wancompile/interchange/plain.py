"""The parameters of the model that a compiled one was made from, as far as it still has them.

Law: smoothing stored `W * s * (1 / t)[:, None]`, the bias of value rows as `b / t`, and the weight
and bias of a norm divided by s. Here each is multiplied back, in fp32.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from wancompile.errors import ArtifactError
from wancompile.interchange.names import wholes
from wancompile.ir import match
from wancompile.ir.site import Fold
from wancompile.lora.places import Place, places
from wancompile.passes.add_low_rank import LINEARS, weight_of
from wancompile.program import Program
from wancompile.quant.numerics import QTensor

_FOLDED = "folded."
# Ops between a norm and the linear that reads it.
_BETWEEN = (
    *match.CAST_OPS,
    operator.getitem,
    torch.ops.wancompile.quantize_per_token.default,
)


class Plain:
    """Looks parameters up by the names and shapes that the original model has for them.

    `originals` are parameters of the original model: what is not in 8 bits is taken from there, to
    the last bit, and need not be recovered.
    """

    def __init__(self, program: Program, originals: Mapping[str, Tensor] | None = None) -> None:
        self._state = program.state
        self._places = {path: found[0] for path, found in places(program).items()}
        self._norms = dict(_norms(program))
        self._originals = originals

    def is_quantized(self, name: str) -> bool:
        """Whether a parameter is a weight that the compiled model has in 8 bits."""
        found = self._linear(name)
        return found is not None and found[1] == "weight" and bool(found[0].scale)

    def bits(self, name: str) -> QTensor | None:
        """Return the stored 8 bits of a weight, unless a smooth scale is in them."""
        found = self._linear(name)
        if found is None or not self.is_quantized(name):
            return None
        place, _, span = found
        if place.inputs or place.outputs:
            return None
        return QTensor(self._state[place.weight][span], self._state[place.scale][span])

    def value(self, name: str, shape: torch.Size) -> Tensor:
        """Return a parameter: in fp32 where it was recovered, else as it is stored.

        Raises:
            ArtifactError: it is not there, or in another shape.
        """
        found = self._found(name, shape)
        if found is None:
            raise ArtifactError(
                f"{name} was computed into something from which it cannot be had back: "
                "give the folder of the original model"
            )
        if found.shape != shape:
            raise ArtifactError(
                f"{name} has the shape {list(found.shape)}, not {list(shape)}: the model is another"
                " one than its configuration says"
            )
        return found

    def _found(self, name: str, shape: torch.Size) -> Tensor | None:
        if self._originals is not None and not self.is_quantized(name):
            return self._originals.get(name)
        if self._linear(name) is not None:
            return self._of_linear(name)
        if name in self._state:
            return self._state[name]
        # Anything else that was folded may have been multiplied by numbers of the model's own.
        factor = self._norms.get(f"{_FOLDED}{name}")
        if factor is None:
            return None
        folded = self._state[f"{_FOLDED}{name}"]
        return folded.float() * self._state[factor] if factor else folded

    def _of_linear(self, name: str) -> Tensor | None:
        place, kind, span = self._linear(name) or (None, "", slice(0))
        stored = place and (place.weight if kind == "weight" else place.bias)
        if place is None or not stored:
            return None
        found = self._state[stored][span]
        if kind == "weight" and place.scale:
            found = QTensor(found, self._state[place.scale][span]).dequantize()
        if kind == "weight" and place.inputs:
            found = found.float() / self._state[place.inputs]
        if not place.outputs:
            is_known = bool(place.scale) or not stored.startswith(_FOLDED)
            return found if is_known else None
        # The vector is that of the rows of this linear, not of all that were merged.
        rows = slice(span.start - place.first, span.stop - place.first)
        outputs = self._state[place.outputs][rows]
        return found.float() / (outputs[:, None] if kind == "weight" else outputs)

    def _linear(self, name: str) -> tuple[Place, str, slice] | None:
        """Return where a weight or bias is: the place, which of both, the rows."""
        path, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            return None
        if path in self._places:
            return self._places[path], kind, self._places[path].span
        for whole, part, count in wholes(path):
            place = self._places.get(whole)
            if place is not None and place.rows % count == 0:
                rows = place.rows // count
                first = place.first + part * rows
                return place, kind, slice(first, first + rows)
        return None


def _norms(program: Program) -> Iterator[tuple[str, str]]:
    """Yield the names of folded vectors of norms, and of the smooth scale they were divided by.

    The latter is empty where they were cast alone.
    """
    linears = {
        str(weight_of(node).target): node for node in match.nodes_of(program.graph, *LINEARS)
    }
    for group in program.groups:
        if group.fold is not Fold.AFFINE or not group.weights:
            continue
        first = group.weights[0]
        folded = list(_folded_of(linears[first.data or first.name]))
        if first.inputs and not folded:
            raise ArtifactError(
                "the norm that the smooth scale was folded into is not found", site=str(group.key)
            )
        for name in folded:
            yield name, first.inputs


def _folded_of(linear: Node) -> Iterator[str]:
    """Yield the names of the folded vectors of the norm that a linear reads."""
    norm: Any = match.args(linear)[0]
    while match.is_op(norm, *_BETWEEN):
        norm = match.args(norm)[0]
    for operand in norm.all_input_nodes:
        if operand.op == "get_attr" and str(operand.target).startswith(_FOLDED):
            yield str(operand.target)
