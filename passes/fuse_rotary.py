"""Make RMSNorm and rotary embedding of q and k, and their rounding to 8 bits, one op.

Law: `quantize(hadamard(rotate(rms_norm(x))))` is one function of x, the angles and the scale, if
that is not its own, and without the rounding to 8 bits `rotate(rms_norm(x))` is one of x and the
angles. As one op nothing is rounded to 16 bits in between, and a kernel passes over memory once.

    before                                          after
    %n = rms_norm(%x, [128], w)
    %h = reshape(%n, [b, s, 8, 8, 2])
    %e, %o = select(%h, 4, 0), select(%h, 4, 1)
    %a = sub(mul(%e, %cos), mul(%o, %sin))
    %b = add(mul(%e, %sin), mul(%o, %cos))
    %r = permute(reshape(stack([%a, %b], 4), [b, s, 8, 16]), [0, 2, 1, 3])
    %h = hadamard(%r)
    %q = quantize_per_head(%h, scale, i8)           %q = norm_rotate_quantize(%x, w, %cos, ...)
    %p, %s = quantize_per_token(%h, None, i8)       %p, %s = norm_rotate_quantize_per_token(...)

    %y = attention(%r, ...)                         %r = norm_rotate(%x, w, %cos, ...)
                                                    %y = attention(%r, ...)

A stored vector that is subtracted before rounding per head is taken up by the op.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.passes.rotations import Rotation, rotation_behind, unshifted

aten = torch.ops.aten
ops = torch.ops.wancompile


@dataclass(frozen=True)
class FuseRotary:
    """Fuse q and k of each attention, 8-bit or not, with the rotation and the norm behind them."""

    name: ClassVar[str] = "fuse_rotary"
    needs: ClassVar[Level] = Level.FUSED
    gives: ClassVar[Level] = Level.FUSED
    exact: ClassVar[bool] = False

    def apply(self, draft: Draft) -> None:
        """Look behind every quantise op per head, then behind what float attention compares."""
        angles = _Angles(draft)
        for node in match.nodes_of(draft.graph, ops.quantize_per_head.default):
            turned, shift = unshifted(match.args(node)[0])
            rotated, is_turned = _unturned(turned)
            found = _fixed_rotation(rotated)
            if isinstance(found, Rotation):
                operands = *_operands(found, angles, node), _stored_shift(draft, shift, node)
                _fuse_per_head(draft, node, operands, is_turned)
            else:
                draft.skip(node, found, node)
        for node in _rounded_per_token(draft):
            rotated, is_turned = _unturned(match.args(node)[0])
            found = _fixed_rotation(rotated)
            if isinstance(found, Rotation):
                _fuse_per_token(draft, node, _operands(found, angles, node), is_turned)
            else:
                draft.skip(node, found, node)
        cross = {one.site for one in draft.attentions if not one.is_self}
        for node, value in _compared(draft):
            found = _float_rotation(value)
            if isinstance(found, Rotation):
                _fuse_float(draft, node, value, _operands(found, angles, value))
            elif match.site(node) not in cross:  # which nobody expects to rotate
                draft.skip(node, found, value)
        draft.sort()


def _compared(draft: Draft) -> Iterator[tuple[Node, Node]]:
    """Yield each float attention with its q and with its k, but for those that are fused."""
    for node in match.nodes_of(draft.graph, aten.scaled_dot_product_attention.default):
        for value in dict.fromkeys(match.args(node)[:2]):
            if not match.is_op(value, ops.norm_rotate.default):
                yield node, value


def _rounded_per_token(draft: Draft) -> list[Node]:
    """Return what quantizes each head of each token, as of q: nothing else has four dims."""
    found = match.nodes_of(draft.graph, ops.quantize_per_token.default)
    return [
        node
        for node in found
        if match.rank(match.args(node)[0]) == 4 and match.args(node)[1] is None
    ]


def _unturned(value: Node) -> tuple[Node, bool]:
    """Return what is turned, and whether anything is."""
    is_turned = match.is_op(value, ops.hadamard.default)
    return (match.args(value)[0], True) if is_turned else (value, False)


def _float_rotation(value: Node) -> Rotation | str:
    if match.val(value).dtype == torch.float64:
        return "it is rotated in float64, and the op computes in float32"
    return _fixed_rotation(value)


def _fixed_rotation(value: Node) -> Rotation | str:
    """Return the rotation behind `value` if its table is as wide in every call."""
    found = rotation_behind(value)
    if isinstance(found, Rotation) and not isinstance(match.shape(found.cos)[-1], int):
        return "the width of its table may change from call to call"
    return found


def _fuse_per_head(draft: Draft, node: Node, operands: tuple[Any, ...], is_turned: bool) -> None:
    _, scale, dtype = match.args(node)
    draft.did(node, f"norm and rotation round to {match.dtype_name(dtype)}")
    op = ops.norm_rotate_quantize.default
    draft.replace_call(node, op, *operands, scale, is_turned, dtype)


def _fuse_per_token(draft: Draft, node: Node, operands: tuple[Any, ...], is_turned: bool) -> None:
    _, _, dtype = match.args(node)
    draft.did(node, f"norm and rotation round to {match.dtype_name(dtype)}, by scales of their own")
    op = ops.norm_rotate_quantize_per_token.default
    draft.replace_call(node, op, *operands, is_turned, dtype)


def _fuse_float(draft: Draft, node: Node, value: Node, operands: tuple[Any, ...]) -> None:
    draft.did(node, "norm and rotation round once, for attention in floating point")
    draft.replace_call(value, ops.norm_rotate.default, *operands, match.val(value).dtype)


def _operands(found: Rotation, angles: _Angles, before: Node) -> tuple[Any, ...]:
    """Return x, weight, eps, cos and sin, as both ops take them."""
    return *found.normed, angles.flat(found.cos, before), angles.flat(found.sin, before)


@dataclass
class _Angles:
    """The cosines and sines as `[S, D / 2]`, one view for all their readers."""

    draft: Draft
    views: dict[Node, Node] = field(default_factory=dict)

    def flat(self, angle: Node, before: Node) -> Node:
        """Return the view of one table; a reader ahead of the first needs the graph sorted."""
        if angle not in self.views:
            shape = [-1, match.shape(angle)[-1]]
            self.views[angle] = self.draft.call(
                aten.reshape.default, angle, shape, before=before, like=angle
            )
        return self.views[angle]


def _stored_shift(draft: Draft, shift: Node | None, before: Node) -> Node | None:
    """Return `shift` as `[H, D]`."""
    if shift is None:
        return None
    tensor = draft.state[str(shift.target)]
    return draft.store(f"{shift.target}_flat", tensor.flatten(0, 1), before=before)
