"""A graph as few boxes: products, norms and fused ops, and between them what is elementwise."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch.fx import Graph, Node

from wancompile.ir import match
from wancompile.recipe import DTYPES

# Ops that only say how numbers lie, or in which type: a line stands for them.
_LAYOUT = frozenset(
    (
        *("reshape", "view", "permute", "transpose", "flatten", "unflatten", "contiguous", "clone"),
        *("slice", "select", "narrow", "chunk", "split", "unbind", "getitem"),
        *("expand", "unsqueeze", "squeeze", "_to_copy", "to", "alias"),
    )
)
# Ops of torch with a box of their own; products and attentions have one anyway.
_LOUD = frozenset(
    (
        *("layer_norm", "rms_norm", "group_norm", "gelu", "silu", "softmax"),
        *("convolution", "conv3d", "matmul", "mm", "bmm"),
    )
)


class Look(StrEnum):
    """How a box is drawn."""

    EIGHT = "eight"
    """It computes with 8-bit operands."""
    ROUNDS = "rounds"
    """It rounds what it computes to 8 bits."""
    FLOAT = "float"
    """A product or an attention in floating point."""
    PLAIN = "plain"
    """Norms, activations and what is elementwise, in floating point."""
    OUTSIDE = "outside"
    """It comes from outside of what is drawn."""


@dataclass
class Box:
    """One box: its first line, its second one, and what it stands for, a value a line."""

    title: str
    text: str
    look: Look
    nodes: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class Reduced:
    """Boxes in an order of execution, and edges between them by index, each once."""

    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]


def reduce(graph: Graph, inside: Collection[Node], block: str) -> Reduced:
    """Return the nodes `inside` as boxes.

    Elementwise ops that depend on each other, with no other op between them, share a box: those
    at one depth, counted in ops with boxes of their own, so that no two boxes wait for each other.
    """
    nodes = [node for node in graph.nodes if node in inside and _is_value(node)]
    cluster = _clusters(nodes)
    members: defaultdict[Node, list[Node]] = defaultdict(list)
    for node in nodes:
        members[cluster[node]].append(node)
    quiet = {head for head, group in members.items() if all(_op(one) in _LAYOUT for one in group)}
    reads = {head: _heads_read(group, head, cluster) for head, group in members.items()}
    outside = _outside(nodes, cluster, quiet, reads)
    boxes = [Box(_named(one), "", Look.OUTSIDE, [one]) for one in outside]
    index = {one: place for place, one in enumerate(outside)}
    for head in _in_order(members, reads):
        if head not in quiet:
            index[head] = len(boxes)
            boxes.append(_box(members[head], block, cluster))
    edges = dict.fromkeys(
        (index[source], index[head])
        for head in members
        if head not in quiet
        for source in _through(head, quiet, reads)
        if source in index
    )
    return Reduced(tuple(boxes), tuple(edges))


def _clusters(nodes: Iterable[Node]) -> dict[Node, Node]:
    """Return for each node the one that stands for its box."""
    depth: dict[Node, int] = {}
    parent: dict[Node, Node] = {}

    def head(node: Node) -> Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    for node in nodes:
        read = [one for one in node.all_input_nodes if one in depth]
        depth[node] = max((depth[one] for one in read), default=0) + _is_loud(node)
        parent[node] = node
        if _is_loud(node):
            continue
        for one in read:
            if depth[one] == depth[node] and not _is_loud(one):
                parent[head(node)] = head(one)
    return {node: head(node) for node in parent}


def _heads_read(
    group: Iterable[Node], head: Node, cluster: Mapping[Node, Node]
) -> dict[Node, None]:
    """Return what a box reads: heads of other boxes, and nodes from outside."""
    found = (one for node in group for one in node.all_input_nodes if _is_read(one))
    heads = (cluster.get(one, one) for one in found)
    return {one: None for one in heads if one is not head}


def _is_read(node: Node) -> bool:
    return node.op != "get_attr" and _is_value(node)


def _through(
    head: Node, quiet: Collection[Node], reads: Mapping[Node, Mapping[Node, None]]
) -> list[Node]:
    """Return what a box reads, with lines going on where nothing is computed."""
    found, waiting, seen = [], [*reads[head]], set()
    while waiting:
        one = waiting.pop(0)
        if one in seen:
            continue
        seen.add(one)
        if one in quiet:
            waiting += reads[one]
        else:
            found.append(one)
    return found


def _outside(
    nodes: Iterable[Node],
    cluster: Mapping[Node, Node],
    quiet: Collection[Node],
    reads: Mapping[Node, Mapping[Node, None]],
) -> list[Node]:
    """Return the values from outside that are read, those with the same readers once."""
    readers: defaultdict[Node, list[Node]] = defaultdict(list)
    for head in dict.fromkeys(cluster[node] for node in nodes):
        if head in quiet:
            continue
        for source in _through(head, quiet, reads):
            if source not in cluster:
                readers[source].append(head)
    return list({tuple(heads): one for one, heads in readers.items()}.values())


def _in_order(
    members: Mapping[Node, list[Node]], reads: Mapping[Node, Mapping[Node, None]]
) -> list[Node]:
    """Return the heads so that each comes behind all that it reads."""
    done: dict[Node, None] = {}
    stack: list[Node] = [*members][::-1]
    while stack:
        head = stack[-1]
        missing = [one for one in reads[head] if one in members and one not in done]
        if missing:
            stack += missing
        else:
            done[stack.pop()] = None
    return [*done]


def _box(group: list[Node], block: str, cluster: Mapping[Node, Node]) -> Box:
    first = group[0]
    if not _is_loud(first):
        counted = Counter(_op(node) for node in group if _op(node) not in _LAYOUT)
        names = [name if n == 1 else f"{n} {name}" for name, n in counted.most_common()]
        return Box(", ".join(names), "", Look.PLAIN, group)
    sites = _sites(first, cluster)
    names = [site.removeprefix(f"{block}.") for site in sites]
    if not names:
        return Box(_op(first), "", _look(first), group)
    return Box(_shared(names), _op(first), _look(first), group)


def _sites(node: Node, cluster: Mapping[Node, Node]) -> list[str]:
    """Return the site of an op, those whose outputs are cut out of its own, or its weight's."""
    site = match.site(node)
    if site is not None:
        return [str(site)]
    cut = [
        str(found)
        for user in node.users
        if user in cluster and not _is_loud(user) and (found := match.site(user)) is not None
    ]
    stored = [
        str(one.target).rpartition(".")[0]
        for one in node.all_input_nodes
        if one.op == "get_attr" and _has_8_bits(one.meta.get("val"))
    ]
    return cut or stored


def _shared(names: list[str]) -> str:
    """Write `attn1.to_q, to_k` for names with a common beginning."""
    first, *others = names
    start = first.rpartition(".")[0] + "."
    return ", ".join([first, *(one.removeprefix(start) for one in others)])


def _named(node: Node) -> str:
    return str(match.site(node) or node.name)


def _look(node: Node) -> Look:
    if any(_has_8_bits(one.meta.get("val")) for one in node.all_input_nodes):
        return Look.EIGHT
    if _has_8_bits(node.meta.get("val")):
        return Look.ROUNDS
    return Look.FLOAT if match.is_linear(node) or match.is_attention(node) else Look.PLAIN


def _has_8_bits(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_has_8_bits, value))
    return isinstance(value, torch.Tensor) and value.dtype in DTYPES.values()


def _is_value(node: Node) -> bool:
    """Whether a node makes tensors, not sizes."""
    value = node.meta.get("val")
    return node.op != "output" and isinstance(value, (torch.Tensor, tuple, list))


def _is_loud(node: Node) -> bool:
    if match.is_linear(node) or match.is_attention(node) or _op(node) in _LOUD:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return target.namespace not in ("aten", "prims")


def _op(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._opname
    return str(getattr(target, "__name__", target))
