"""Recognising the rotation of normed pairs of channels that attention compares.

Reads only. Law: `(even cos - odd sin, even sin + odd cos)` turns a pair by an angle, whatever the
order of terms and factors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from wancompile.ir import match

aten = torch.ops.aten


class Rotation(NamedTuple):
    """`normed` is (x `[B, S, C]`, weight, eps); the angles are `[1, S, 1, D / 2]`."""

    normed: tuple[Node, Node | None, float]
    cos: Node
    sin: Node


def rotation_behind(value: Node) -> Rotation | str:
    """Return what `value`, q or k, is computed from, or why that is not the rotation of a norm."""
    value = match.narrowed_from(value)
    if not match.is_op(value, aten.permute.default) or list(match.args(value)[1]) != [0, 2, 1, 3]:
        return "its heads are not laid out as [B, S, H, D] before"
    heads = match.args(value)[0]
    stack = _laid_out_from(heads)
    if not _stacks_pairs(stack) or not _alike(match.shape(stack)[:3], match.shape(heads)[:3]):
        return "its operand is not rotated by pairs of channels"
    turns = list(_turns(*map(match.narrowed_from, match.args(stack)[0])))
    if not turns:
        return "its operand is not a rotation of pairs"
    turn = next(filter(_is_by_table, turns), None)
    if turn is None:
        return "its pairs are not neighbouring channels turned by a table of angles"
    normed = _normed(turn.even.args[0])
    if normed is None:
        return "there is no RMSNorm over all heads before the rotation"
    return Rotation(normed, turn.cos, turn.sin)


def unshifted(value: Node) -> tuple[Node, Node | None]:
    """Part `value` into rotated keys and the stored `[H, 1, D]` subtracted from them, or None."""
    if not match.is_op(value, aten.sub.Tensor) or value.kwargs:  # alpha scales an operand
        return value, None
    rotated, shift = match.operands(value)
    if not match.is_constant(shift) or not match.is_tensor(rotated) or match.rank(rotated) != 4:
        return value, None
    _, heads, _, channels = match.shape(rotated)
    is_vector = tuple(match.shape(shift)) == (heads, 1, channels)
    return (rotated, shift) if is_vector else (value, None)


def _laid_out_from(node: Node) -> Node:
    """Walk back over reshapes and casts between floats."""
    last = None
    while node is not last:
        last = node
        node = match.strip(match.narrowed_from(node), (aten.reshape.default,))
    return node


def _stacks_pairs(node: Node) -> bool:
    """Whether `node` is `[B, S, H, D / 2, 2]`, two values side by side."""
    if not match.is_op(node, aten.stack.default) or match.rank(node) != 5:
        return False
    return len(match.args(node)[0]) == 2 and _is_last(node, match.arg(node, 1, "dim", 0))


class _Turn(NamedTuple):
    """`even cos - odd sin` beside `even sin + odd cos`."""

    even: Any
    odd: Any
    cos: Any
    sin: Any


def _turns(a: Node, b: Node) -> Iterator[_Turn]:
    """Yield every reading of (a, b) as a turn: pairs and angles have the same place in it."""
    if not match.is_op(a, aten.sub.Tensor) or not match.is_op(b, aten.add.Tensor):
        return
    products = [_unrounded(one) for one in (*match.operands(a), *match.operands(b))]
    if a.kwargs or b.kwargs or not all(match.is_op(one, aten.mul.Tensor) for one in products):
        return
    factors = [[_unwidened(one) for one in match.operands(product)] for product in products]
    even_cos, odd_sin, *rest = factors
    sums = [frozenset(one) for one in rest]
    for (even, cos), (odd, sin) in itertools.product(_orders(even_cos), _orders(odd_sin)):
        wanted = [frozenset({even, sin}), frozenset({odd, cos})]
        if sums in (wanted, wanted[::-1]):
            yield _Turn(even, odd, cos, sin)


def _orders(pair: list[Any]) -> tuple[list[Any], list[Any]]:
    return pair, pair[::-1]


def _unrounded(value: Any) -> Any:
    return match.narrowed_from(value) if isinstance(value, Node) else value


def _unwidened(value: Any) -> Any:
    return match.widened_from(value) if isinstance(value, Node) else value


def _is_by_table(turn: _Turn) -> bool:
    """Whether neighbouring channels of `[B, S, H, D / 2, 2]` turn by a table of angles."""
    even, odd = turn.even, turn.odd
    if not match.is_op(even, aten.select.int) or not match.is_op(odd, aten.select.int):
        return False
    pairs, dim, index = match.args(even)
    if match.rank(pairs) != 5 or match.shape(pairs)[-1] != 2 or not _is_last(pairs, dim):
        return False
    if index != 0 or match.args(odd) != (pairs, dim, 1):
        return False
    return all(_is_table(angle, match.shape(pairs)) for angle in (turn.cos, turn.sin))


def _is_last(node: Node, dim: int) -> bool:
    return match.dim_of(dim, match.rank(node)) == match.rank(node) - 1


def _is_table(angle: Any, pairs: torch.Size) -> bool:
    """Whether `angle` is fp32 `[1, S, 1, D / 2]`: the same for all videos and heads."""
    if not match.is_tensor(angle) or match.val(angle).dtype != torch.float32:
        return False
    shape = match.shape(angle)
    wanted = (1, pairs[1], 1, pairs[3])
    return len(shape) == 4 and _alike(shape, wanted)


def _alike(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return all(map(match.same, one, other))


def _normed(pairs: Node) -> tuple[Node, Node | None, float] | None:
    """Return (x, weight, eps) of the RMSNorm over all channels that `pairs` are laid out from."""
    norm = _laid_out_from(pairs)
    if not match.is_op(norm, aten.rms_norm.default) or match.rank(norm) != 3:
        return None
    x, normalized = match.args(norm)[:2]
    if list(normalized) != [match.shape(norm)[-1]]:
        return None
    if not _alike(match.shape(pairs)[:2], match.shape(norm)[:2]):
        return None
    eps = match.arg(norm, 3, "eps")
    eps = torch.finfo(match.val(x).dtype).eps if eps is None else eps
    weight = match.arg(norm, 2, "weight")
    return x, weight, float(eps)
