"""A block of one norm and one attention, and folding into it by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from kit import exported
from small import CHANNELS, X, heads, joined, tensors
from torch import Tensor
from torch.fx import Node

from wancompile import pipeline
from wancompile.ir import match
from wancompile.ir.site import Group, Role
from wancompile.passes import NORMALIZE
from wancompile.program import Program

TENSORS = {
    **tensors("wq", "bq", "wk", "bk", "wv", "bv", "wo", "bo", "gain", "shift"),
    "bias": torch.linspace(-1, 1, CHANNELS),
}
SHAPE = (CHANNELS,)
SCALE = torch.linspace(-2, 2, CHANNELS, dtype=torch.float64).exp()


def normal(fn: Callable[..., Any], dtype: torch.dtype = torch.float64, **more: Tensor) -> Program:
    """Export `fn(self, x)` over TENSORS in `dtype` and normalize it."""
    stored = {name: tensor.to(dtype) for name, tensor in (TENSORS | more).items()}
    return pipeline.run(exported(fn, X.to(dtype), **stored), NORMALIZE)


def project(self: Any, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, H, S, D] of one value."""
    q, k = F.linear(y, self.wq, self.bq), F.linear(y, self.wk, self.bk)
    return heads(q), heads(k), heads(F.linear(y, self.wv, self.bv))


def attend(self: Any, y: Tensor) -> Tensor:
    """Self-attention with its four projections."""
    return F.linear(joined(F.scaled_dot_product_attention(*project(self, y))), self.wo, self.bo)


def group_of(program: Program, role: Role) -> Group:
    """Return the one group of `role`."""
    (group,) = (group for group in program.groups if group.role is role)
    return group


def place(program: Program, role: Role) -> tuple[Node, set[Node]]:
    """Return what the group of `role` reads, and its members."""
    nodes = match.by_site(program.graph)
    members = [nodes[site] for site in group_of(program, role).sites]
    return match.args(members[0])[0], set(members)


def folded(program: Program, role: Role, fold: ModuleType, scale: Tensor = SCALE) -> Program:
    """Fold 1/scale before the group of `role` and multiply its weights by `scale`."""
    draft = program.draft()
    nodes = match.by_site(draft.graph)
    members = [nodes[site] for site in group_of(program, role).sites]
    found = fold.find(match.args(members[0])[0], set(members))
    assert not isinstance(found, str), found
    top = next(iter(draft.graph.nodes))
    dtype = match.val(members[0]).dtype
    fold.apply(draft, found, draft.store("inverse", (1 / scale).to(dtype), before=top))
    factor = draft.store("scale", scale.to(dtype), before=top)
    for node in members:
        x, weight, *rest = match.args(node)
        draft.set_args(node, (x, draft.scaled(weight, factor, before=node), *rest))
    draft.erase_dead()
    result = replace(program, graph=draft.graph, state=draft.state)
    result.verify()
    return result


def input_of(program: Program, role: Role, x: Tensor) -> Tensor:
    """Return what the group of `role` reads when the program runs on `x`."""
    producer, _ = place(program, role)
    draft = program.draft()
    (output,) = draft.graph.find_nodes(op="output")
    same = next(node for node in draft.graph.nodes if node.name == producer.name)
    output.args = ([same],)
    draft.erase_dead()
    found: Tensor = replace(program, graph=draft.graph, state=draft.state)(x=x)
    return found
