"""Finding what stays the same from call to call; reads only.

In a denoising loop the encoder states of a prompt are the same at every step, and so is all that is
computed of them alone. Dataflow tells what that is, and where the graph is to be cut so that little
has to be kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch.fx import Graph, Node

from wancompile.ir import match
from wancompile.ir.dataflow import Dataflow
from wancompile.ir.site import Attention

aten = torch.ops.aten


class _Kind(IntEnum):
    """What a value depends on; that of a call is the largest of its operands."""

    STORED = 0
    STEADY = 1
    VARYING = 2


@dataclass(frozen=True)
class Cut:
    """Where a graph falls apart.

    `inputs` are the names that the graph gives to the steady ones, in order. `steady` are all
    values that depend on these alone, the inputs included. `kept` are the ones that the prologue
    hands over, in execution order; `hoisted` the calls that it makes of tensors, `weights` the
    names of the stored tensors that only it reads. `sizes` says, for each size that a steady input
    has, too, which input and dimension that is.
    """

    inputs: tuple[str, ...]
    steady: frozenset[Node]
    kept: tuple[Node, ...]
    hoisted: tuple[Node, ...]
    weights: frozenset[str]
    sizes: Mapping[Node, tuple[Node, int]]


def steady_inputs(graph: Graph, attentions: Iterable[Attention]) -> tuple[str, ...]:
    """Return the inputs that keys and values of cross-attention are made of: encoder states.

    Less those that reach the query of the first attention: latents, timesteps and what is added to
    them. In the order of the graph's inputs, by the names that it gives them.
    """
    inputs, sites = Dataflow(graph).inputs, match.by_site(graph)
    found = [(sites[one.site], one.is_self) for one in attentions if one.site in sites]
    if not found:
        return ()
    position = match.position(graph)
    first = min((node for node, _ in found), key=position.__getitem__)
    crossed = [node for node, is_self in found if not is_self]
    read = frozenset().union(*(inputs[one] for node in crossed for one in match.args(node)[1:3]))
    steady = read - inputs[match.args(first)[0]]
    return tuple(node.name for node in sorted(steady, key=position.__getitem__))


def cut(graph: Graph, inputs: Collection[str]) -> Cut:
    """Return where `graph` falls apart if the inputs of these names stay the same.

    The time is linear in the nodes.
    """
    steady = [node for node in match.inputs(graph) if node.name in inputs]
    sizes = _sizes(graph, steady)
    kinds = _kinds(graph, frozenset(steady), sizes)
    kept = _kept(graph, kinds)
    inside = set(match.backward(kept, sizes.__contains__))
    ends = frozenset((*kept, *sizes))
    rest = match.backward([graph.output_node()], ends.__contains__)
    return Cut(
        inputs=tuple(node.name for node in steady),
        steady=frozenset(node for node, kind in kinds.items() if kind is _Kind.STEADY),
        kept=kept,
        hoisted=tuple(n for n in graph.nodes if n in inside and _is_work(n)),
        weights=_stored(inside) - _stored(rest),
        sizes=sizes,
    )


def _sizes(graph: Graph, steady: Iterable[Node]) -> dict[Node, tuple[Node, int]]:
    """Return the sizes that are provably that of an input."""
    known: dict[Any, tuple[Node, int]] = {}
    for node in steady:
        for dim, size in enumerate(match.shape(node)):
            known.setdefault(_symbol(size), (node, dim))
    found = {n: _symbol(n.meta["val"]) for n in match.nodes_of(graph, aten.sym_size.int)}
    return {node: known[size] for node, size in found.items() if size is not None and size in known}


def _symbol(size: Any) -> Any:
    """Return what a size is an expression of, None for a number."""
    return size.node.expr if match.is_symbolic(size) else None


def _kinds(graph: Graph, steady: Collection[Node], sizes: Collection[Node]) -> dict[Node, _Kind]:
    # What the caller gets is the caller's to write to, so it must not be what is kept.
    returned = set(match.backward([graph.output_node()], _owns_memory))
    kinds: dict[Node, _Kind] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            kinds[node] = _Kind.STEADY if node in steady else _Kind.VARYING
        elif node in sizes:
            kinds[node] = _Kind.STORED
        elif node.op == "output" or node in returned:
            kinds[node] = _Kind.VARYING
        else:
            behind = (kinds[one] for one in node.all_input_nodes)
            kinds[node] = max(behind, default=_Kind.STORED)
    return kinds


def _kept(graph: Graph, kinds: Mapping[Node, _Kind]) -> tuple[Node, ...]:
    """Return the steady values that the rest reads, or that it can make what it reads of."""
    kept: set[Node] = set()
    seen: set[Node] = set()
    todo = [node for node in graph.nodes if kinds[node] is _Kind.VARYING]
    while todo:
        reader = todo.pop()
        for node in reader.all_input_nodes:
            if node in seen or kinds[node] is not _Kind.STEADY or node.op == "placeholder":
                continue
            seen.add(node)
            if _is_made_again(node):
                todo.append(node)
            else:
                kept.add(node)
    return tuple(node for node in graph.nodes if node in kept)


def _owns_memory(node: Node) -> bool:
    return node.op != "output" and not _is_made_again(node)


def _is_made_again(node: Node) -> bool:
    """Whether a value has no memory of its own, or only more than the one that it is made of."""
    is_layout = match.is_op(node, *match.LAYOUT_OPS)
    return is_layout or match.is_number(node) or match.widened_from(node) is not node


def _is_work(node: Node) -> bool:
    return node.op == "call_function" and not match.is_number(node)


def _stored(nodes: Iterable[Node]) -> frozenset[str]:
    return frozenset(str(node.target) for node in nodes if match.is_constant(node))
