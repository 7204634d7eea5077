"""Find the two linears of every MLP, and list with a reason each linear that no group takes.

Law: two linears with nothing but an activation (and layout) between them, downstream of an
attention, are the up and down projections of an MLP. Upstream of every attention the same shape is
an embedder, which works on a few tokens and is left alone.

    linear -> gelu -> linear, after attention      -> groups  ffn_up_proj and ffn_down_proj

Nothing is rewritten; the graph before is the graph after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.dataflow import Dataflow
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.ir.site import Group, Role, Site, Source, Ungrouped
from wancompile.passes import sources

aten = torch.ops.aten

_ACTIVATIONS = (aten.gelu.default, aten.silu.default, aten.relu.default)


@dataclass(frozen=True)
class DetectMlp:
    """Group MLPs, then account for the linears that are left."""

    name: ClassVar[str] = "detect_mlp"
    needs: ClassVar[Level] = Level.EXPORTED
    gives: ClassVar[Level] = Level.EXPORTED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Visit every linear that no attention has taken."""
        flow = Dataflow(draft.graph)
        taken = {site for group in draft.groups for site in group.sites}
        groups = list(draft.groups)
        for node in match.nodes_of(draft.graph, aten.linear.default):
            down = _down_of(node)
            if match.site(node) in taken or down is None or match.site(down) in taken:
                continue
            if not _follows(flow, node):
                continue
            groups += _pair(node, down)
            taken |= {site for group in groups[-2:] for site in group.sites}
        order = {site: index for index, site in enumerate(match.by_site(draft.graph))}
        in_order = sorted(groups, key=lambda group: order[group.key])
        draft.groups = tuple(_with_producers(in_order, match.by_site(draft.graph)))
        projects = {site: one.site for one in draft.attentions for site in (one.q, one.k, one.v)}
        draft.ungrouped = tuple(
            Ungrouped(site, _reason(flow, node, projects.get(site)))
            for site, node in match.by_site(draft.graph).items()
            if match.is_float_linear(node) and site not in taken
        )


def _with_producers(groups: Iterable[Group], nodes: Mapping[Site, Node]) -> Iterator[Group]:
    """Name each producer value by the first site that reads it."""
    first: dict[object, Site] = {}
    for group in groups:
        producer = first.setdefault(nodes[group.key].args[0], group.key)
        yield replace(group, producer=producer)


def _pair(up: Node, down: Node) -> list[Group]:
    up_site, down_site = match.site(up), match.site(down)
    assert up_site is not None, "name_sites runs before detection"
    assert down_site is not None, "name_sites runs before detection"
    return [
        Group(Role.FFN_UP, (up_site,), sources.of_stream(up)),
        Group(Role.FFN_DOWN, (down_site,), Source.ACTIVATION),
    ]


def _down_of(up: Node) -> Node | None:
    """Return the linear that reads the activation of `up`, if nothing else lies between them."""
    activation = _sole_reader(up)
    if not match.is_op(activation, *_ACTIVATIONS) or activation is None:
        return None
    down = _sole_reader(activation)
    return down if down is not None and match.is_float_linear(down) else None


def _sole_reader(node: Node) -> Node | None:
    reader = match.sole_reader(node)
    while match.is_op(reader, *match.LAYOUT_OPS, *match.CAST_OPS):
        reader = match.sole_reader(reader)
    return reader


def _follows(flow: Dataflow, node: Node) -> bool:
    return match.args(node)[0] in flow.follows_attention


def _reason(flow: Dataflow, node: Node, attention: Site | None) -> str:
    if attention is not None:
        return f"projects an operand of {attention}, but shares its input with no other projection"
    if _follows(flow, node):
        return "reads the video stream, but is no projection of an attention and no part of an MLP"
    names = sorted(source.name for source in flow.inputs[node])
    return f"lies before every attention: embeds {', '.join(names) or 'constants'}"
