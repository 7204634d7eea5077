"""Norms and rotations of heads in every spelling, what reads them, and what they are in fp64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fusing import TYPES, called_fused
from kit import Function
from small import CHANNELS, HEAD_DIM, HEADS

BF16 = torch.bfloat16
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(2, 20, CHANNELS, generator=DRAW)
TENSORS = {
    "weight": 1 + 0.3 * torch.randn(CHANNELS, generator=DRAW),
    "rates": torch.tensor([0.7, 0.1]),
    "scale": torch.tensor([0.02, 0.03, 0.04]),
}
BF16_TENSORS = TENSORS | {"weight": TENSORS["weight"].to(BF16)}
ops = torch.ops.wancompile
# Sylvester's, of heads of four.
HADAMARD = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
SHIFT = {"shift": torch.randn(HEADS, 1, HEAD_DIM, generator=DRAW)}


def angles(self, x):
    """[1, S, 1, D / 2], fp32."""
    places = torch.arange(x.shape[1], dtype=torch.float32)
    return (places[:, None] * self.rates.float())[None, :, None]


def norm(self, x):
    return F.rms_norm(x, (CHANNELS,), self.weight, 1e-6)


def split(x):
    return x.unflatten(-1, (HEADS, HEAD_DIM))


def pairs(heads):
    return heads.unflatten(-1, (-1, 2)).unbind(-1)


def stored(heads, first, second):
    """As Wan does it: strided stores into a fresh buffer."""
    out = torch.empty_like(heads)
    out[..., 0::2], out[..., 1::2] = first, second
    return out.type_as(heads)


def wan(self, x):
    heads, turn = split(norm(self, x)), angles(self, x)
    even, odd = pairs(heads)
    cos, sin = turn.cos(), turn.sin()
    return stored(heads, even * cos - odd * sin, even * sin + odd * cos).transpose(1, 2)


def stacked(self, x):
    """By another hand: stack, factors and terms the other way round, fp32 on the way."""
    turn = angles(self, x)
    even, odd = pairs(split(norm(self, x)).float())
    first = turn.cos() * even - turn.sin() * odd
    second = turn.cos() * odd + turn.sin() * even
    return torch.stack((first, second), -1).flatten(-2).to(x.dtype).transpose(1, 2)


def selected_tables(self, x):
    """Cosine and sine are themselves halves of one value."""
    turn = angles(self, x)
    cos, sin = torch.stack((turn.cos(), turn.sin()), -1).unbind(-1)
    even, odd = pairs(split(norm(self, x)))
    parts = even * cos - odd * sin, even * sin + odd * cos
    return torch.stack(parts, -1).flatten(-2).transpose(1, 2)


def backwards(self, x):
    """A rotation by minus the angle, with the signs in the table."""
    turn = -angles(self, x)
    even, odd = pairs(split(norm(self, x)))
    parts = even * turn.cos() - odd * turn.sin(), even * turn.sin() + odd * turn.cos()
    return torch.stack(parts, -1).flatten(-2).transpose(1, 2)


def without_gain(self, x):
    heads, turn = split(F.rms_norm(x, (CHANNELS,), eps=1e-5)), angles(self, x)
    even, odd = pairs(heads)
    parts = even * turn.cos() - odd * turn.sin(), even * turn.sin() + odd * turn.cos()
    return stored(heads, *parts).transpose(1, 2)


SPELLINGS = (wan, stacked, selected_tables, backwards, without_gain)


def program(fn, x=X, dtype="int8", *, turned=False, **more):
    def rounded(self, x):
        value = fn(self, x)
        if turned:
            value = ops.hadamard(value)
        if "shift" in more:
            value = value - self.shift
        return ops.quantize_per_head(value, self.scale, TYPES[dtype])

    return called_fused(rounded, x, **{**TENSORS, **more})


def per_token(fn, x=X, dtype="int8", *, turned=False, **more):
    """Rounded by a scale for each head of each token."""

    def rounded(self, x):
        value = fn(self, x)
        return ops.quantize_per_token(ops.hadamard(value) if turned else value, None, TYPES[dtype])

    return called_fused(rounded, x, **{**TENSORS, **more})


def exact(fn, x, shift=0.0, *, turned=False, **more):
    with torch.no_grad():
        value = fn(Function(fn, **{**TENSORS, **more}).double(), x.double())
    value = value.double() @ HADAMARD.double() if turned else value.double()
    return value - shift


def attended(fn, x=X, **more):
    """`fn` as q, k and v of an attention in floating point: its value, and what attention gives."""

    def compared(self, x):
        value = fn(self, x)
        return value, F.scaled_dot_product_attention(value, value, value)

    return called_fused(compared, x, **{**TENSORS, **more})
