"""Erase what does nothing at inference: assertions, disabled dropout, casts to the same type.

Law: dropout that is not training, `to` with the type and device a tensor already has, `contiguous`,
`clone`, `detach` and their kin return the values they were given; assertions return nothing.

    before                                          after
    _assert_tensor_metadata(%x, dtype=f32, ...)
    %y: f32 = to(%x, f32)
    %z: f32 = dropout(%y, 0.0, False)
    %w: f32 = linear(%z, weight, bias)              %w: f32 = linear(%x, weight, bias)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level

aten = torch.ops.aten

_ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
)
_COPIES = (
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
    aten.positive.default,
    aten._to_copy.default,
)
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.native_dropout.default)
_CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
)


@dataclass(frozen=True)
class DropNoops:
    """Erase calls that return what they were given, and spell every real cast `to.dtype`."""

    name: ClassVar[str] = "drop_noops"
    needs: ClassVar[Level] = Level.EXPORTED
    gives: ClassVar[Level] = Level.EXPORTED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Visit every call once, in order."""
        counts = {"assertion": 0, "no-op": 0}
        for node in list(draft.graph.nodes):
            if match.is_op(node, *_ASSERTIONS):
                draft.graph.erase_node(node)
                counts["assertion"] += 1
            elif (same := _same_values(node)) is not None:
                draft.replace(node, same)
                counts["no-op"] += 1
            elif match.is_op(node, *_CASTS) and node.target is not aten.to.dtype:
                _respell(draft, node)
        for kind, count in counts.items():
            if count:
                draft.did("graph", f"{count} {kind}{'s' if count > 1 else ''} erased")


def _same_values(node: Node) -> Node | None:
    """Return the operand whose values `node` returns unchanged, if there is one."""
    if not match.is_op(node, *_COPIES, *_DROPOUTS, *_CASTS, aten.expand.default):
        return None
    operand = match.args(node)[0]
    if not isinstance(operand, Node) or not match.is_tensor(node):
        return None
    if match.is_op(node, *_DROPOUTS) and _drops(node):
        return None
    before, after = match.val(operand), match.val(node)
    unchanged = before.dtype == after.dtype and before.device == after.device
    return operand if unchanged and _same_shape(before, after) else None


def _drops(node: Node) -> bool:
    probability, train = match.arg(node, 1, "p", 0.5), match.arg(node, 2, "train", True)
    return bool(train) and probability != 0


def _same_shape(before: torch.Tensor, after: torch.Tensor) -> bool:
    return before.dim() == after.dim() and all(
        match.same(a, b) for a, b in zip(before.shape, after.shape, strict=True)
    )


def _respell(draft: Draft, node: Node) -> None:
    operand: Any = match.args(node)[0]
    before, after = match.val(operand), match.val(node)
    if before.device == after.device:
        draft.replace_call(node, aten.to.dtype, operand, after.dtype)
    else:
        draft.replace_call(node, aten.to.device, operand, after.device, after.dtype)
