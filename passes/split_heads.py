"""Give an attention over batch times heads its four dimensions back.

Law: attention treats each entry of its leading dimensions alone, so over `[B * H, S, D]` reshapes
of `[B, H, S, D]` operands it is the reshape of the attention over these operands. Per-head scales
and the fold into value rows need to see the heads.

    before                                          after
    %q3 = reshape(%q, [B * H, S, D]), also k, v
    %o3 = attention(%q3, %k3, %v3)
    %o = reshape(%o3, [B, H, S, D])                 %o = attention(%q, %k, %v)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitHeads:
    """Let attentions over merged batch and heads work on [B, H, S, D]."""

    name: ClassVar[str] = "split_heads"
    needs: ClassVar[Level] = Level.EXPORTED
    gives: ClassVar[Level] = Level.EXPORTED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Visit every attention over three dimensions once; say why one stays so."""
        for node in match.nodes_of(draft.graph, aten.scaled_dot_product_attention.default):
            if match.rank(node) != 3:
                continue
            operands = [_split(operand) for operand in match.args(node)[:3]]
            reason = _obstacle(node, operands)
            if reason:
                draft.skip(node, reason, node)
                continue
            _rewrite(draft, node, operands)


def _split(operand: Any) -> Node | None:
    """Return the [B, H, S, D] tensor of which `operand` [B * H, S, D] is a reshape."""
    if not match.is_op(operand, aten.reshape.default):
        return None
    inner: Node = match.args(operand)[0]
    if match.rank(inner) != 4 or not _alike(match.shape(inner)[2:], match.shape(operand)[1:]):
        return None
    # Where the heads come first, the second dimension is the batch.
    if match.is_op(inner, aten.permute.default) and match.args(inner)[1][0] != 0:
        return None
    return inner


def _obstacle(node: Node, operands: Sequence[Node | None]) -> str:
    found = [operand for operand in operands if operand is not None]
    if len(found) < 3 or not all(_alike(_leading(one), _leading(found[0])) for one in found):
        return "its operands are no reshapes of [batch, heads, tokens, head size]"
    if match.arg(node, 3, "attn_mask") is not None:
        return "it has a mask over merged batch and heads"
    query = match.shape(found[0])
    sizes = (*query[:3], match.shape(found[2])[-1])
    split_again = all(
        match.is_op(reader, aten.reshape.default) and _alike(match.shape(reader), sizes)
        for reader in match.readers(node)
    )
    return "" if split_again else "its result is not split into batch and heads again"


def _leading(node: Node) -> torch.Size:
    return match.shape(node)[:2]


def _alike(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(match.same, a, b))


def _rewrite(draft: Draft, node: Node, operands: Sequence[Node | None]) -> None:
    rest = match.args(node)[3:]
    whole = draft.call(match.target(node), *operands, *rest, before=node, like=node, **node.kwargs)
    draft.did(node, "batch and heads are two dimensions again")
    for reader in match.readers(node):
        draft.replace(reader, whole)
    for size in list(node.users):
        # Sizes of the merged result are those of the merged query, but for the head size of v.
        last = match.args(size)[1] in (2, -1)
        draft.redirect(size, node, match.args(node)[2 if last else 0])
    draft.graph.erase_node(node)
