"""What smoothing multiplied the weights of linears by; for `quantize_linears`, which folds it in.

Whoever changes a weight later, as a LoRA does, has to change what is stored in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from wancompile.ir import edit, match
from wancompile.ir.edit import Draft
from wancompile.ir.site import Group, Site, Weight

aten = torch.ops.aten


@dataclass
class Factors:
    """Keeps the factors of weights beside the graph, equal ones once."""

    draft: Draft
    kept: dict[tuple[Node, ...], str] = field(default_factory=dict)

    def of_group(self, group: Group, nodes: Mapping[Site, Node]) -> tuple[Weight, ...]:
        """Return an entry for each weight of `group`, none of which is quantized yet."""
        return group.weights or tuple(self._entries(group, nodes))

    def _entries(self, group: Group, nodes: Mapping[Site, Node]) -> Iterator[Weight]:
        for site in group.sites:
            weight: Any = match.args(nodes[site])[1]
            name = match.stored_name(weight)
            if name is None:
                continue
            inputs, outputs = _vectors(weight)
            yield Weight(
                site,
                name,
                inputs=self._keep(f"{name}_inputs", inputs),
                outputs=self._keep(f"{name}_outputs", outputs),
            )

    def _keep(self, name: str, vectors: tuple[Node, ...]) -> str:
        if not vectors:
            return ""
        if vectors not in self.kept:
            self.kept[vectors] = self.draft.keep(name, self._product(vectors))
        return self.kept[vectors]

    def _product(self, vectors: tuple[Node, ...]) -> Tensor:
        first, *rest = (edit.evaluate_constant(one, self.draft.state).flatten() for one in vectors)
        for one in rest:
            first = first * one
        return first


def _vectors(weight: Node) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Return what the columns `[K]` and what the rows `[N, 1]` of a weight are multiplied by."""
    inputs: list[Node] = []
    outputs: list[Node] = []
    while True:
        weight = match.strip(weight)
        if not match.is_op(weight, aten.mul.Tensor):
            return tuple(inputs), tuple(outputs)
        weight, vector = match.operands(weight)
        (inputs if match.rank(vector) == 1 else outputs).append(vector)


def located(weights: tuple[Weight, ...], nodes: Mapping[Site, Node]) -> tuple[Weight, ...]:
    """Return the entries with the names of the stored 8 bits of those that have become some."""

    def one(weight: Weight) -> Weight:
        node = nodes[weight.site]
        if match.is_float_linear(node):
            return weight
        _, _, data, scale, *_ = match.args(node)
        return replace(weight, data=str(data.target), scale=str(scale.target))

    return tuple(map(one, weights))
