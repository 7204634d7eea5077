"""What values depend on: one forward sweep over a graph, linear in its size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch.fx import Graph, Node

from wancompile.ir import match


@dataclass(frozen=True)
class Dataflow:
    """Dependence of every value on the graph's inputs and on attention.

    Sizes do not count: a value reshaped to the size of another does not depend on it.
    """

    graph: Graph

    @cached_property
    def inputs(self) -> dict[Node, frozenset[Node]]:
        """The graph inputs whose numbers each value depends on."""
        found: dict[Node, frozenset[Node]] = {}
        empty: frozenset[Node] = frozenset()
        for node in self.graph.nodes:
            if node.op == "placeholder":
                found[node] = frozenset({node})
                continue
            # Not of its operands that are tensors alone: some ops yield several at once.
            parents = [one for one in node.all_input_nodes if not match.is_number(one)]
            found[node] = empty.union(*(found[parent] for parent in parents))
        return found

    @cached_property
    def follows_attention(self) -> frozenset[Node]:
        """The values that depend on the output of some attention."""
        found: set[Node] = set()
        for node in self.graph.nodes:
            if match.is_attention(node) or any(parent in found for parent in tensor_inputs(node)):
                found.add(node)
        return frozenset(found)


def tensor_inputs(node: Node) -> list[Node]:
    """Return the operands of `node` that are tensors."""
    return [parent for parent in node.all_input_nodes if match.is_tensor(parent)]


def linears_behind(node: Node) -> list[Node]:
    """Return the nearest linears that the numbers of `node` come from.

    The walk passes norms, rotations, reshapes and arithmetic; it ends at linears, attentions,
    inputs and stored tensors.
    """
    found: list[Node] = []
    seen: set[Node] = set()
    todo = [node]
    while todo:
        one = todo.pop()
        if one in seen or match.is_attention(one):
            continue
        seen.add(one)
        if match.is_float_linear(one):
            found.append(one)
        else:
            todo.extend(tensor_inputs(one))
    return found
