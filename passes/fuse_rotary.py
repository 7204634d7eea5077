"""Make RMSNorm, rotary embedding and rounding of q and k one op.

Law: `quantize(rotate(rms_norm(x)))` is one function of x, the angles and the scale. As one op
nothing is rounded to 16 bits in between, and a kernel passes over memory once.

    before                                          after
    %n = rms_norm(%x, [128], w)
    %h = reshape(%n, [b, s, 8, 8, 2])
    %e, %o = select(%h, 4, 0), select(%h, 4, 1)
    %a = sub(mul(%e, %cos), mul(%o, %sin))
    %b = add(mul(%e, %sin), mul(%o, %cos))
    %r = permute(reshape(stack([%a, %b], 4), [b, s, 8, 16]), [0, 2, 1, 3])
    %q = quantize_per_head(%r, scale, i8)           %q = norm_rotate_quantize(%x, w, %cos, ...)

A stored vector that is subtracted before rounding is taken up by the op.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.passes.rotations import rotation_behind

aten = torch.ops.aten
ops = torch.ops.wancompile


@dataclass(frozen=True)
class FuseRotary:
    """Fuse each quantise op per head with the rotation and the norm behind it."""

    name: ClassVar[str] = "fuse_rotary"
    needs: ClassVar[Level] = Level.FUSED
    gives: ClassVar[Level] = Level.FUSED
    exact: ClassVar[bool] = False

    def apply(self, draft: Draft) -> None:
        """Look behind every quantise op per head."""
        angles = _Angles(draft)
        for node in match.nodes_of(draft.graph, ops.quantize_per_head.default):
            found = rotation_behind(node)
            if isinstance(found, str):
                draft.skip(node, found, node)
                continue
            x, weight, eps = found.normed
            cos, sin = (angles.flat(one, node) for one in (found.cos, found.sin))
            _, scale, dtype = match.args(node)
            draft.did(node, f"norm and rotation round to {match.dtype_name(dtype)}")
            shift = _stored_shift(draft, found.shift, node)
            operands = (x, weight, eps, cos, sin, shift, scale, dtype)
            draft.replace_call(node, ops.norm_rotate_quantize.default, *operands)


@dataclass
class _Angles:
    """The cosines and sines as `[S, D / 2]`, one view for all their readers."""

    draft: Draft
    views: dict[Node, Node] = field(default_factory=dict)

    def flat(self, angle: Node, before: Node) -> Node:
        """Return the view of one table; readers have to come in execution order."""
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
