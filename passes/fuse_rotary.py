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

import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level

aten = torch.ops.aten
ops = torch.ops.wancompile

_VIEWS = (aten.reshape.default, aten.to.dtype)


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
            found = _rotation_behind(node)
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


class _Rotation(NamedTuple):
    """`normed` is (x `[B, S, C]`, weight, eps); the angles are `[1, S, 1, D / 2]`.

    `shift` is a stored `[H, 1, D]` that is subtracted after the rotation, or None.
    """

    normed: tuple[Node, Node | None, float]
    cos: Node
    sin: Node
    shift: Node | None


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


def _rotation_behind(node: Node) -> _Rotation | str:
    """Return what a quantise op per head reads, or why it cannot be fused."""
    value, shift = _unshifted(match.args(node)[0])
    if not match.is_op(value, aten.permute.default) or list(match.args(value)[1]) != [0, 2, 1, 3]:
        return "its heads are not laid out as [B, S, H, D] before"
    stack = match.strip(match.args(value)[0], _VIEWS)
    if not match.is_op(stack, aten.stack.default) or not _is_last(
        stack, match.arg(stack, 1, "dim", 0)
    ):
        return "its operand is not rotated by pairs of channels"
    turned = _turned(*(match.strip(part) for part in match.args(stack)[0]))
    if turned is None:
        return "its operand is not a rotation of pairs"
    even, odd, cos, sin = turned
    pairs = _pairs(even, odd)
    if pairs is None or not all(_is_table(angle, match.shape(pairs)) for angle in (cos, sin)):
        return "its pairs are not neighbouring channels turned by a table of angles"
    normed = _normed(pairs)
    if normed is None:
        return "there is no RMSNorm over all heads before the rotation"
    return _Rotation(normed, cos, sin, shift)


def _unshifted(value: Node) -> tuple[Node, Node | None]:
    if not match.is_op(value, aten.sub.Tensor):
        return value, None
    rotated, shift = match.operands(value)
    if not match.is_constant(shift) or not match.is_tensor(rotated) or match.rank(rotated) != 4:
        return value, None
    _, heads, _, channels = match.shape(rotated)
    is_vector = tuple(match.shape(shift)) == (heads, 1, channels)
    return (rotated, shift) if is_vector else (value, None)


def _stored_shift(draft: Draft, shift: Node | None, before: Node) -> Node | None:
    """Return `shift` as `[H, D]`."""
    if shift is None:
        return None
    tensor = draft.state[str(shift.target)]
    return draft.store(f"{shift.target}_flat", tensor.flatten(0, 1), before=before)


def _turned(a: Node, b: Node) -> tuple[Node, Node, Node, Node] | None:
    """Return (even, odd, cos, sin) of `a = even cos - odd sin`, `b = even sin + odd cos`."""
    if not match.is_op(a, aten.sub.Tensor) or not match.is_op(b, aten.add.Tensor):
        return None
    products = [match.strip(one) for one in (*match.operands(a), *match.operands(b))]
    if not all(match.is_op(one, aten.mul.Tensor) for one in products):
        return None
    factors = [frozenset(map(_unwidened, match.operands(one))) for one in products]
    if not all(len(one) == 2 for one in factors):
        return None
    even_cos, odd_sin, *rest = factors
    for even, odd in itertools.product(even_cos, odd_sin):
        (cos,), (sin,) = even_cos - {even}, odd_sin - {odd}
        wanted = [frozenset({even, sin}), frozenset({odd, cos})]
        if rest in (wanted, wanted[::-1]) and match.is_op(even, aten.select.int):
            return even, odd, cos, sin
    return None


def _unwidened(value: Any) -> Any:
    return match.widened_from(value) if isinstance(value, Node) else value


def _pairs(even: Any, odd: Any) -> Node | None:
    """Return the value `[B, S, H, D / 2, 2]` whose last dim the two select from."""
    if not match.is_op(even, aten.select.int) or not match.is_op(odd, aten.select.int):
        return None
    pairs, dim, index = match.args(even)
    is_last = _is_last(pairs, dim) and match.rank(pairs) == 5
    same = match.args(odd) == (pairs, dim, 1) and index == 0
    return pairs if is_last and same and match.shape(pairs)[-1] == 2 else None


def _is_last(node: Node, dim: int) -> bool:
    return match.dim_of(dim, match.rank(node)) == match.rank(node) - 1


def _is_table(angle: Any, pairs: torch.Size) -> bool:
    """Whether `angle` is fp32 `[1, S, 1, D / 2]`: the same for all videos and heads."""
    if not match.is_tensor(angle) or match.val(angle).dtype != torch.float32:
        return False
    shape = match.shape(angle)
    wanted = (1, pairs[1], 1, pairs[3])
    return len(shape) == 4 and all(map(match.same, shape, wanted))


def _normed(pairs: Node) -> tuple[Node, Node | None, float] | None:
    """Return (x, weight, eps) of the RMSNorm over all channels that `pairs` are laid out from."""
    norm = match.strip(pairs, _VIEWS)
    if not match.is_op(norm, aten.rms_norm.default) or match.rank(norm) != 3:
        return None
    x, normalized = match.args(norm)[:2]
    rows = zip(match.shape(pairs)[:2], match.shape(norm)[:2], strict=True)
    if list(normalized) != [match.shape(norm)[-1]] or not all(match.same(*pair) for pair in rows):
        return None
    eps = match.arg(norm, 3, "eps")
    eps = torch.finfo(match.val(x).dtype).eps if eps is None else eps
    weight = match.arg(norm, 2, "weight")
    return x, weight, float(eps)
