"""FLOPs of one call of a model, counted over its graph and told apart by what they are for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from wancompile.errors import InputError
from wancompile.ir import match
from wancompile.ir.dataflow import Dataflow
from wancompile.program import Program
from wancompile.recipe import Recipe

aten = torch.ops.aten

SELF_ATTENTION = "self-attention"
CROSS_ATTENTION = "cross-attention"
OTHER_ATTENTION = "other attention"
EMBEDDING = "embedding linears"
OTHER_LINEAR = "other linears"
CONVOLUTION = "convolution"
OTHER_PRODUCT = "other products"
# What comes after the roles, in this order.
_REST = (
    SELF_ATTENTION,
    CROSS_ATTENTION,
    OTHER_ATTENTION,
    EMBEDDING,
    OTHER_LINEAR,
    CONVOLUTION,
    OTHER_PRODUCT,
)

_CONVOLUTIONS = frozenset(
    {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv3d.padding}
)
_PRODUCTS = frozenset({aten.matmul.default, aten.mm.default, aten.bmm.default})


@dataclass(frozen=True)
class Work:
    """FLOPs of one part of one call of the model; `quantized` of them would run in 8 bits."""

    part: str
    calls: int
    flops: int
    quantized: int


def flops(node: Node) -> int:
    """Return the FLOPs of one call, a multiply-add counting as two; 0 for what is no product.

        linear       x [..., K] by W [N, K]                     2 * tokens * K * N
        attention    q [B, H, Sq, D], k [B, H, Sk, D],          2 * B * H * Sq * Sk * (D + Dv)
                     v [B, H, Sk, Dv]
        convolution  W [N, C/g, *kernel]                        2 * out elements * C/g * kernel
        matmul       [..., M, K] by [..., K, N]                 2 * out elements * K

    Biases, norms, softmax and everything elementwise are left out, as in
    `torch.utils.flop_counter`.

    Raises:
        InputError: a dimension is dynamic.
    """
    if match.is_linear(node):
        return 2 * numel(node) * size_of(match.args(node)[0], -1)
    if match.is_attention(node):
        q, k, v = match.args(node)[:3]
        return 2 * numel(q) // size_of(q, -1) * size_of(k, -2) * (size_of(k, -1) + size_of(v, -1))
    if match.is_op(node, *_CONVOLUTIONS):
        weight = match.args(node)[1]
        return 2 * numel(node) * (numel(weight) // size_of(weight, 0))
    if match.is_op(node, *_PRODUCTS):
        return 2 * numel(node) * size_of(match.args(node)[0], -1)
    return 0


def work_of(program: Program, recipe: Recipe) -> tuple[Work, ...]:
    """Return the work of one call of `program`, part by part, and what `recipe` would quantize.

    Linears count under the role of their group; those in none as embedding linears, if they come
    before every attention, or as other linears.

    Raises:
        InputError: the program was traced with dynamic dimensions.
    """
    parts = _Parts(program, recipe)
    calls: Counter[str] = Counter()
    total: Counter[str] = Counter()
    quantized: Counter[str] = Counter()
    for node in program.graph.nodes:
        count = flops(node)
        if count == 0:
            continue
        part, in_8_bits = parts.of(node)
        calls[part] += 1
        total[part] += count
        quantized[part] += count if in_8_bits else 0
    return tuple(Work(part, calls[part], total[part], quantized[part]) for part in _ordered(total))


def _ordered(parts: Iterable[str]) -> list[str]:
    found = list(parts)
    roles = [part for part in found if part not in _REST]
    return roles + [part for part in _REST if part in found]


class _Parts:
    """Says which part of the model a product belongs to, and whether it would run in 8 bits."""

    def __init__(self, program: Program, recipe: Recipe) -> None:
        self._flow = Dataflow(program.graph)
        self._recipe = recipe
        self._kinds = {
            one.site: SELF_ATTENTION if one.is_self else CROSS_ATTENTION
            for one in program.attentions
        }
        self._groups = {
            site: (str(group.role), recipe.spec_for(group) is not None)
            for group in program.groups
            for site in group.sites
        }

    def of(self, node: Node) -> tuple[str, bool]:
        site = match.site(node)
        if match.is_attention(node):
            kind = OTHER_ATTENTION if site is None else self._kinds.get(site, OTHER_ATTENTION)
            in_8_bits = site is not None and self._recipe.attention_for(site) is not None
            return kind, kind == SELF_ATTENTION and in_8_bits
        if match.is_op(node, *_CONVOLUTIONS):
            return CONVOLUTION, False
        if not match.is_linear(node):
            return OTHER_PRODUCT, False
        if site in self._groups:
            return self._groups[site]
        return OTHER_LINEAR if node in self._flow.follows_attention else EMBEDDING, False


def numel(node: Node) -> int:
    """Return the number of elements that `node` yields."""
    return math.prod(fixed(size) for size in match.shape(node))


def size_of(node: Node, dim: int) -> int:
    """Return the size of one dimension of what `node` yields."""
    return fixed(match.shape(node)[dim])


def fixed(size: Any) -> int:
    """Return a size that is a number, or raise `InputError` for a symbolic one."""
    if not isinstance(size, int):
        raise InputError("the program has dynamic dimensions: trace it with dynamic=False to plan")
    return size
