from __future__ import annotations

import torch
import torch.nn.functional as F
from kit import counts, error, normalized

from wancompile.ir import match
from wancompile.passes import SplitHeads

X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))
GAIN = {"w": torch.tensor([0.5, 1.0, 2.0, 3.0])}


def merged(x, order=(0, 2, 1, 3)):
    """[B, S, 12] -> [B * 3, S, 4]."""
    return x.unflatten(-1, (3, 4)).permute(*order).flatten(0, 1)


def attend(self, x):
    q = merged(x)
    out = F.scaled_dot_product_attention(q, q * self.w, q + 1)
    return out.unflatten(0, (-1, 3))


def split_first(self, x):
    q, k, v = merged(x), merged(x * 2), merged(x + 1)
    out = F.scaled_dot_product_attention(q, k, v, scale=0.3)
    return out.view(x.shape[0], 3, -1, 4).transpose(1, 2).flatten(2) * self.w[0]


def asks_for_sizes(self, x):
    q, k, v = merged(x), merged(x[:, 1:]), merged(x[:, 1:] + 1)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.view(out.shape[0] // 3, 3, out.shape[1], out.shape[2]) * self.w


def rank_of(program):
    (node,) = (node for node in program.graph.nodes if match.is_attention(node))
    return match.rank(node)


def test_the_reshapes_go(golden):
    program = normalized(split_first, X, SplitHeads(), **GAIN)
    golden(program.print("canonical"))
    assert rank_of(program) == 4
    assert error(program, split_first, torch.randn(3, 7, 12), **GAIN) < 1e-6


def test_sizes_of_the_result_are_read_elsewhere():
    program = normalized(asks_for_sizes, X, SplitHeads(), **GAIN)
    assert rank_of(program) == 4
    assert counts(program)["scaled_dot_product_attention"] == 1
    assert error(program, asks_for_sizes, torch.randn(3, 7, 12), **GAIN) < 1e-6


def heads_first(self, x):
    q = merged(x, (2, 0, 1, 3))
    return F.scaled_dot_product_attention(q, q, q).unflatten(0, (3, -1)) * self.w


def result_stays_merged(self, x):
    q = merged(x)
    return F.scaled_dot_product_attention(q, q, q) * self.w


def no_heads(self, x):
    return F.scaled_dot_product_attention(x, x, x) * self.w[0]


def masked(self, x):
    q = merged(x)
    mask = torch.ones(q.shape[0], x.shape[1], x.shape[1], dtype=torch.bool)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask).unflatten(0, (-1, 3)) * self.w


def test_what_stays_says_why():
    reasons = {
        attend: "no reshapes",
        heads_first: "no reshapes",
        no_heads: "no reshapes",
        result_stays_merged: "not split into batch and heads again",
        masked: "mask",
    }
    for fn, reason in reasons.items():
        program = normalized(fn, X, SplitHeads(), **GAIN)
        assert rank_of(program) == 3
        assert reason in program.records[-1].skipped[0].text
        assert error(program, fn, torch.randn(3, 7, 12), **GAIN) < 1e-6
