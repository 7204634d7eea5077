"""Who reads a producer; shared by the folds. Reads only."""

from __future__ import annotations

from torch.fx import Node

from wancompile.ir import match


def foreign_reader(producer: Node, members: set[Node]) -> Node | None:
    """Return a reader of `producer` that is not in the group, looking back over its casts too."""
    node, allowed = producer, set(members)
    while True:
        for reader in match.readers(node):
            if reader not in allowed:
                return reader
        if not match.is_op(node, *match.CAST_OPS) or not isinstance(match.args(node)[0], Node):
            return None
        allowed, node = {node}, match.args(node)[0]
