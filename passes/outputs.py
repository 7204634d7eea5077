"""Following the output of an attention to what reads it; shared by the detection. Reads only."""

from __future__ import annotations

from collections import deque

import torch
from torch.fx import Node

from wancompile.ir import match

aten = torch.ops.aten

_CARRIERS = (*match.LAYOUT_OPS, *match.CAST_OPS, aten.add.Tensor)


def forms(node: Node) -> list[Node]:
    """Return every laid-out, cast or summed form of an attention's output, nearest first."""
    found = {node: None}
    todo = deque(found)
    while todo:
        for user in match.readers(todo.popleft()):
            if match.is_op(user, *_CARRIERS) and user not in found:
                found[user] = None
                todo.append(user)
    return list(found)


def sum_of(a: Node, b: Node) -> Node | None:
    """Return the addition that joins the outputs of two attentions."""
    return next(
        (node for node in forms(a) if match.is_op(node, aten.add.Tensor) and node in set(forms(b))),
        None,
    )


def attentions_behind(node: Node) -> set[Node]:
    """Return the attentions that a laid-out output comes from."""
    todo, found = [node], set[Node]()
    while todo:
        one = todo.pop()
        if match.is_attention(one):
            found.add(one)
        elif match.is_op(one, *_CARRIERS):
            todo.extend(one.all_input_nodes)
    return found


def made_of_attention(node: Node) -> bool:
    """Whether `node` is made of attention outputs alone, laid out, cast or summed."""
    todo = [node]
    while todo:
        one = todo.pop()
        if match.is_attention(one):
            continue
        if not match.is_op(one, *_CARRIERS):
            return False
        todo.extend(parent for parent in one.all_input_nodes if match.is_tensor(parent))
    return True
