"""What 8-bit self-attention can do, simulated in plain PyTorch: every rounding is a choice.

Values are rounded to the grid of their type and stay in fp32, as do products and softmax, so that
the error is that of the roundings alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from wancompile.ir import match
from wancompile.ir.site import Site
from wancompile.ops.attention import P_RANGE
from wancompile.ops.hadamard import turned
from wancompile.passes.quantize_attention import softmax_scale, value_inverse
from wancompile.program import Program
from wancompile.quant.numerics import (
    FP8,
    INT8,
    QMAX,
    SMALLEST_SCALE,
    absmax,
    decode,
    quantize,
    scale_of,
)
from wancompile.quant.stats import HeadStats, Stats

# SageAttention (Zhang et al. 2025) gives so many queries, and so many keys, one scale.
_QUERY_BLOCK, _KEY_BLOCK = 128, 64
PlainRanges = Mapping[Site, tuple[HeadStats, HeadStats]]
"""The ranges of q and k of each self-attention, as they are."""

_GOLDEN = (5**0.5 - 1) / 2  # its multiples spread evenly between integers

CHOICES: Mapping[str, tuple[str, ...]] = {
    "qk": ("exact", "int8", "fp8"),
    "q_scale": ("head", "token", "block"),
    "k_scale": ("head", "token", "block"),
    "turn": ("none", "balance", "hadamard"),
    "k_centre": ("none", "middle", "mean"),
    "p": ("exact", "bf16", "fp8", "fp8-same-sum", "int8", "uint8", "int8-dither", "uint8-dither"),
    "v": ("exact", "bf16", "fp8", "int8"),
    "v_scale": ("head", "channel"),
    "v_centre": ("none", "middle", "mean"),
}


@dataclass(frozen=True)
class Choice:
    """One way to compute self-attention; the default rounds nothing.

    Attributes:
        qk: the type of q and k.
        q_scale: one scale of q per head from calibration, or per token, or per block of tokens,
            both from the call.
        k_scale: the same of k.
        turn: what q and k are multiplied by, which q k^T does not see. "balance" multiplies each
            pair of rotated channels of q by a factor and divides that of k by it, so that their
            calibrated ranges are alike; the factor can go into the weights of the norms before the
            rotation. "hadamard" turns both by the orthogonal matrix of signs (Ashkboos et al. 2024,
            "QuaRot"), which spreads a large channel over all.
        clip: static scales of q and k are those of `clip` times the calibrated range.
        k_centre: what is subtracted from each channel of k: nothing, the middle of its calibrated
            range, or its mean over the tokens of the call. Softmax does not see it.
        p: the type of the weights exp(S - max S). "fp8" is e4m3(256 P), divided by the sum of the
            unrounded ones, "fp8-same-sum" by that of the rounded ones. "int8" and "uint8" round to
            127 or 255 steps between 0 and the largest weight of a query in a block of keys, so that
            each block is summed in integers and added in fp32. That rounds small weights to 0, all
            of them down; "dither" adds a part of a step to each key first, which evens it out.
        p_block: keys in such a block.
        v: the type of v.
        v_scale: one scale per head or per channel, from calibration.
        v_centre: what is subtracted from each channel of v and added to the output: the weights of
            a query sum to one.
    """

    qk: str = "exact"
    q_scale: str = "head"
    k_scale: str = "head"
    turn: str = "none"
    clip: float = 1.0
    k_centre: str = "none"
    p: str = "exact"
    p_block: int = 128
    v: str = "exact"
    v_scale: str = "head"
    v_centre: str = "none"

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {allowed}, not {getattr(self, name)!r}")


@dataclass(frozen=True, eq=False)
class Ranges:
    """The calibrated ranges of q, k and v of one attention, those of q and k also once turned."""

    q: HeadStats
    k: HeadStats
    v: HeadStats
    turned_q: HeadStats
    turned_k: HeadStats


@dataclass(frozen=True, eq=False)
class Simulated:
    """A program whose self-attentions round as `choice` says; called like the model."""

    program: Program
    ranges: Mapping[Site, Ranges]
    choice: Choice

    def __call__(self, **call: object) -> tuple[Tensor]:
        """Return the output of one call of the model."""
        with torch.no_grad():
            leaves = _Replacing(self).run(*self.program.signature.bind((), call))
        return (leaves[0],)


def ranges_of(program: Program, stats: Stats, plain: PlainRanges) -> dict[Site, Ranges]:
    """Return the ranges of every self-attention of a program at NORMAL, smoothed or not.

    `stats` has those of q and k turned, `plain` is what `plain_ranges` found on the same calls.
    """
    groups = {group.key: group for group in program.groups}
    found = {}
    for attention in program.attentions:
        if not attention.is_self:
            continue
        q, k, v = (stats.heads[attention.site, operand] for operand in "qkv")
        inverse = value_inverse(program.state, attention, groups)
        if inverse is not None:
            factor = inverse.to(v.low.device).reshape(v.low.shape[1:])
            v = replace(v, low=v.low * factor, high=v.high * factor)
        found[attention.site] = Ranges(*plain[attention.site], v, q, k)
    return found


def plain_ranges(program: Program, calls: Iterable[Mapping[str, Any]]) -> PlainRanges:
    """Return the ranges of q and k as they are, over `calls`, for each self-attention."""
    watching = _Watching(program)
    for call in calls:
        with torch.no_grad():
            watching.run(*program.signature.bind((), call))
    return {site: (q, k) for site, (q, k) in watching.found.items()}


class _Watching(Interpreter):
    """Runs a graph, and keeps the ranges of q and k of its self-attentions."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self._own = {one.site for one in program.attentions if one.is_self}
        self.found: dict[Site, list[HeadStats]] = {}

    def run_node(self, n: Node) -> object:
        site = match.site(n)
        if site in self._own and match.is_attention(n):
            (q, k, *_), _ = self.fetch_args_kwargs_from_env(n)
            seen = [range_of(one) for one in (q, k)]
            before = self.found.get(site, seen)
            self.found[site] = [a.merge(b) for a, b in zip(before, seen, strict=True)]
        return super().run_node(n)


def range_of(x: Tensor) -> HeadStats:
    """Return the range of `x [B, H, S, D]` over batch and tokens."""
    return HeadStats(x.float().amin((0, 2))[None], x.float().amax((0, 2))[None])


class _Replacing(Interpreter):
    """Runs a graph, its self-attentions by `attend`."""

    def __init__(self, simulated: Simulated) -> None:
        super().__init__(simulated.program.module)
        self._simulated = simulated

    def run_node(self, n: Node) -> object:
        site = match.site(n)
        ranges = self._simulated.ranges.get(site) if site is not None else None
        if ranges is None or not match.is_attention(n):
            return super().run_node(n)
        (q, k, v, *_), _ = self.fetch_args_kwargs_from_env(n)
        return attend(q, k, v, softmax_scale(n), self._simulated.choice, ranges)


def attend(
    q: Tensor, k: Tensor, v: Tensor, factor: float, choice: Choice, ranges: Ranges
) -> Tensor:
    """Return softmax(factor q k^T) v of q, k, v `[B, H, S, D]`, rounded as `choice` says."""
    dtype = q.dtype
    q, k = rounded_qk(q.float(), k.float(), choice, ranges)
    logits = (q @ k.transpose(-2, -1)).mul_(factor)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    v, added = rounded_v(v.float(), choice, ranges.v)
    weights, total = rounded_p(weights, choice)
    return ((weights @ v).div_(total) + added).to(dtype)


def rounded_qk(q: Tensor, k: Tensor, choice: Choice, ranges: Ranges) -> tuple[Tensor, Tensor]:
    """Return what q and k stand for once they are rounded; a centred k stays centred."""
    if choice.qk == "exact":
        return q, k
    of_q, of_k = ranges.q, ranges.k
    if choice.turn == "hadamard":
        q, k = turned(q), turned(k)
        of_q, of_k = ranges.turned_q, ranges.turned_k
    amax_q, amax_k = of_q.amax * choice.clip, of_k.amax * choice.clip
    if choice.k_centre != "none":
        is_static = choice.k_centre == "middle"
        k = k - (of_k.middle[:, None] if is_static else k.mean(-2, keepdim=True))
        # No range is known of a k without its mean: this one is too narrow where they differ.
        amax_k = of_k.half_width * choice.clip
    if choice.turn == "balance":
        gain = _balance(amax_q, amax_k)
        q, k = q * gain[:, None], k / gain[:, None]
        amax_q, amax_k = amax_q * gain, amax_k / gain
    dtype = INT8 if choice.qk == "int8" else FP8
    q = _round_tokens(q, amax_q, choice.q_scale, _QUERY_BLOCK, dtype)
    return q, _round_tokens(k, amax_k, choice.k_scale, _KEY_BLOCK, dtype)


def _balance(amax_q: Tensor, amax_k: Tensor) -> Tensor:
    """Return the factor of q per channel, the same for both of a rotated pair, `[H, D]`."""
    pairs = [amax.unflatten(-1, (-1, 2)).amax(-1).clamp_min(1e-6) for amax in (amax_q, amax_k)]
    return (pairs[1] / pairs[0]).sqrt().repeat_interleave(2, -1)


def _round_tokens(
    x: Tensor, amax: Tensor, granularity: str, block: int, dtype: torch.dtype
) -> Tensor:
    if granularity == "head":
        return _rounded(x, amax.amax(-1)[:, None, None], dtype)
    found = absmax(x, -1, keepdim=True)
    return _rounded(x, found if granularity == "token" else _of_blocks(found, block), dtype)


def _of_blocks(amax: Tensor, block: int) -> Tensor:
    """Return, for every token of `amax [B, H, S, 1]`, the largest value of its block."""
    blocks = [part.amax(-2, keepdim=True).expand_as(part) for part in amax.split(block, -2)]
    return torch.cat(blocks, -2)


def rounded_v(v: Tensor, choice: Choice, found: HeadStats) -> tuple[Tensor, Tensor | float]:
    """Return what v stands for once it is rounded, and what to add to the output."""
    if choice.v == "exact":
        return v, 0.0
    added: Tensor | float = 0.0
    amax = found.amax
    if choice.v_centre != "none":
        is_static = choice.v_centre == "middle"
        added = found.middle[:, None] if is_static else v.mean(-2, keepdim=True)
        v = v - added
        amax = found.half_width
    if choice.v == "bf16":
        return v.bfloat16().float(), added
    if choice.v_scale == "head":
        amax = amax.amax(-1, keepdim=True)
    return _rounded(v, amax[:, None], INT8 if choice.v == "int8" else FP8), added


def rounded_p(weights: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Return the weights as they meet v, and what the product is divided by."""
    if choice.p in ("exact", "bf16"):
        total = weights.sum(-1, keepdim=True)
        return weights if choice.p == "exact" else weights.bfloat16().float(), total
    if choice.p.startswith("fp8"):
        total = weights.sum(-1, keepdim=True)
        weights = decode(weights.mul_(P_RANGE).to(FP8)).div_(P_RANGE)
        return weights, weights.sum(-1, keepdim=True) if choice.p == "fp8-same-sum" else total
    steps = 255 if choice.p.startswith("uint8") else QMAX[INT8]
    for block in weights.split(choice.p_block, -1):
        step = block.amax(-1, keepdim=True).clamp_min_(SMALLEST_SCALE).div_(steps)
        counts = block / step
        if choice.p.endswith("dither"):
            counts += _offsets(block)
        block.copy_(counts.round_().clamp_(0, steps).mul_(step))
    return weights, weights.sum(-1, keepdim=True)


def _offsets(block: Tensor) -> Tensor:
    """Return a number from -1/2 to 1/2 for each key of a block, evenly spread."""
    keys = torch.arange(block.shape[-1], device=block.device)
    return (keys * _GOLDEN).frac() - 0.5


def _rounded(x: Tensor, amax: Tensor, dtype: torch.dtype) -> Tensor:
    scale = scale_of(amax, dtype)
    return decode(quantize(x, scale, dtype)) * scale
