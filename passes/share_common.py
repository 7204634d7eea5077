"""Compute equal expressions once.

Law: two calls of the same pure op on the same operands have the same value. Detection asks whether
linears read the *same* value, so a value must not be spelled twice.

    before                                          after
    %a = to(%x, bf16)                               %a = to(%x, bf16)
    %b = to(%x, bf16)
    %y = linear(%a, w1); %z = linear(%b, w2)        %y = linear(%a, w1); %z = linear(%a, w2)
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.ir.edit import Draft
from wancompile.ir.levels import NORMAL_OPS, Level


@dataclass(frozen=True)
class ShareCommon:
    """Let every reader of a repeated pure expression read its first occurrence."""

    name: ClassVar[str] = "share_common"
    needs: ClassVar[Level] = Level.EXPORTED
    gives: ClassVar[Level] = Level.EXPORTED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Hash every call in order; operands are already shared when a call is reached."""
        first: dict[Hashable, Node] = {}
        count = 0
        for node in list(draft.graph.nodes):
            key = _key(node)
            if key is None:
                continue
            if key in first:
                draft.replace(node, first[key])
                count += 1
            else:
                first[key] = node
        if count:
            draft.did("graph", f"{count} repeated expressions shared")


def _key(node: Node) -> Hashable | None:
    if node.op == "get_attr":
        return ("get_attr", node.target)
    if node.op != "call_function" or node.target not in NORMAL_OPS:
        return None
    return (node.target, _hashable(node.args), _hashable(node.kwargs))


def _hashable(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple(sorted((key, _hashable(item)) for key, item in value.items()))
    # 1, 1.0 and True are equal but mean different things to an op.
    return (type(value), value) if not isinstance(value, torch.SymInt) else str(value)
