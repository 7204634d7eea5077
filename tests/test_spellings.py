"""Attention in every spelling met so far: found with the right groups, or refused with a reason."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kit import Function, exported
from small import HEAD_DIM, HEADS, WEIGHTS, X, heads, joined

from wancompile import pipeline
from wancompile.errors import DetectionError
from wancompile.ir import match
from wancompile.ir.site import Fold, Role
from wancompile.passes import NORMALIZE

SCALE = HEAD_DIM**-0.5
sdpa = F.scaled_dot_product_attention


def by_head_last(x):
    return x.unflatten(-1, (HEADS, HEAD_DIM))


def plain(q, k, v):
    return joined(sdpa(heads(q), heads(k), heads(v)))


def with_all_arguments(q, k, v):
    q, k, v = heads(q), heads(k), heads(v)
    return joined(sdpa(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=0.3))


def with_copies(q, k, v):
    q, k, v = (heads(t).contiguous() for t in (q, k, v))
    return sdpa(q, k, v).transpose(1, 2).contiguous().view(q.shape[0], -1, HEADS * HEAD_DIM)


def softmax_in_fp32(q, k, v):
    shares = F.softmax(heads(q) @ heads(k).mT * SCALE, dim=-1, dtype=torch.float32)
    return joined(shares.to(v.dtype) @ heads(v))


def scaled_on_both_sides(q, k, v):
    q, k = heads(q) * HEAD_DIM**-0.25, heads(k) * HEAD_DIM**-0.25
    return joined(torch.softmax(q @ k.mT, -1) @ heads(v))


def with_idle_dropout(q, k, v):
    shares = (heads(q) @ heads(k).mT * SCALE).softmax(-1)
    return joined(F.dropout(shares, 0.1, training=False) @ heads(v))


def keys_transposed_at_once(q, k, v):
    k = k.transpose(1, 2).reshape(k.shape[0], HEADS, HEAD_DIM, -1)
    return joined((heads(q) @ k / math.sqrt(HEAD_DIM)).softmax(-1) @ heads(v))


def einsum_with_spaces(q, k, v):
    q, k, v = map(by_head_last, (q, k, v))
    shares = (torch.einsum("b i h d, b j h d -> b h i j", q, k) * SCALE).softmax(-1)
    return torch.einsum("b h i j, b j h d -> b i h d", shares, v).flatten(2)


def einsum_with_ellipses(q, k, v):
    shares = (torch.einsum("...id,...jd->...ij", heads(q), heads(k)) * SCALE).softmax(-1)
    return joined(torch.einsum("...ij,...jd->...id", shares, heads(v)))


def einsum_with_operands_swapped(q, k, v):
    q, k, v = map(by_head_last, (q, k, v))
    shares = (torch.einsum("bkhd,bqhd->bhqk", k, q) * SCALE).softmax(-1)
    return torch.einsum("bkhd,bhqk->bqhd", v, shares).flatten(2)


def baddbmm(q, k, v):
    batch = q.shape[0]
    q, k, v = (heads(t).flatten(0, 1) for t in (q, k, v))
    nothing = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=SCALE)
    return joined(torch.bmm(scores.softmax(-1), v).view(batch, HEADS, -1, HEAD_DIM))


def merged_batch_and_heads(q, k, v):
    q, k, v = (heads(t).flatten(0, 1) for t in (q, k, v))
    return joined(sdpa(q, k, v).unflatten(0, (-1, HEADS)))


def with_a_mask(q, k, v):
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    return joined(sdpa(heads(q), heads(k), heads(v), attn_mask=mask))


def causal(q, k, v):
    return joined(sdpa(heads(q), heads(k), heads(v), is_causal=True))


FOLDABLE = [
    plain,
    with_all_arguments,
    with_copies,
    softmax_in_fp32,
    scaled_on_both_sides,
    with_idle_dropout,
    keys_transposed_at_once,
    einsum_with_spaces,
    einsum_with_ellipses,
    einsum_with_operands_swapped,
    baddbmm,
    merged_batch_and_heads,
    with_a_mask,
    causal,
]


def heads_before_batch(q, k, v):
    q, k, v = (by_head_last(t).permute(2, 0, 1, 3).flatten(0, 1) for t in (q, k, v))
    shares = torch.softmax(torch.bmm(q, k.mT) * SCALE, -1)
    return torch.bmm(shares, v).unflatten(0, (HEADS, -1)).permute(1, 2, 0, 3).flatten(2)


def one_key_head_broadcast(q, k, v):
    k, v = heads(k)[:, :1], heads(v)[:, :1]
    return joined((heads(q) @ k.mT * SCALE).softmax(-1) @ v)


def one_key_head_expanded(q, k, v):
    k, v = (heads(t)[:, :1].expand(-1, HEADS, -1, -1) for t in (k, v))
    return joined(sdpa(heads(q), k, v))


def one_key_head_repeated(q, k, v):
    k, v = (heads(t)[:, :1].repeat_interleave(HEADS, 1) for t in (k, v))
    return joined(sdpa(heads(q), k, v))


def grouped_queries(q, k, v):
    return joined(sdpa(heads(q), heads(k)[:, :1], heads(v)[:, :1], enable_gqa=True))


UNFOLDABLE = [
    heads_before_batch,
    one_key_head_broadcast,
    one_key_head_expanded,
    one_key_head_repeated,
    grouped_queries,
]


def around(attention):
    """Self-attention with its four projections and `attention(q, k, v)` on [B, S, C] inside."""

    def fn(self, x):
        q, k = F.linear(x, self.wq, self.bq), F.linear(x, self.wk, self.bk)
        return F.linear(attention(q, k, F.linear(x, self.wv, self.bv)), self.wo, self.bo)

    return fn


def normal(attention):
    return pipeline.run(exported(around(attention), X, **WEIGHTS), NORMALIZE)


def relative_error(program, attention):
    module = Function(around(attention), **WEIGHTS).double()
    x = torch.randn(3, 7, X.shape[-1], dtype=torch.float64)
    with torch.no_grad():
        return pipeline.relative_error(program(x=x.float()), module(x))


@pytest.mark.parametrize("attention", FOLDABLE)
def test_found_and_foldable(attention):
    program = normal(attention)
    assert [(group.role, group.members) for group in program.groups] == [
        (Role.ATTN_QKV, ("wq", "wk", "wv")),
        (Role.ATTN_OUT, ("wo",)),
    ]
    assert program.groups[1].fold is Fold.VALUE_ROWS
    assert not program.ungrouped
    assert relative_error(program, attention) < 1e-6


@pytest.mark.parametrize("attention", FOLDABLE)
def test_heads_are_a_dimension_of_their_own(attention):
    (node,) = [node for node in normal(attention).graph.nodes if match.is_attention(node)]
    assert [match.shape(operand)[1::2] for operand in match.args(node)[:3]] == [(3, 4)] * 3


@pytest.mark.parametrize("attention", UNFOLDABLE)
def test_found_but_nothing_folds_into_the_values(attention):
    program = normal(attention)
    assert [(group.role, group.members) for group in program.groups] == [
        (Role.ATTN_QKV, ("wq", "wk", "wv")),
        (Role.ATTN_OUT, ("wo",)),
    ]
    assert program.groups[1].fold is Fold.QUANTIZE
    assert program.groups[1].fold_reason
    assert relative_error(program, attention) < 1e-6


def keys_down(q, k, v):
    scores = heads(k) @ heads(q).mT * SCALE
    return joined(scores.softmax(-2).mT @ heads(v))


def temperature_from_a_tensor(q, k, v):
    scores = heads(q) @ heads(k).mT / torch.sqrt(torch.tensor(float(HEAD_DIM), dtype=q.dtype))
    return joined(scores.softmax(-1) @ heads(v))


def addend_kept(q, k, v):
    q, k, v = (heads(t).flatten(0, 1) for t in (q, k, v))
    bias = torch.ones(q.shape[0], q.shape[1], k.shape[1])
    shares = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1, alpha=SCALE).softmax(-1)
    return joined(torch.bmm(shares, v).unflatten(0, (-1, HEADS)))


def softmax_by_exp(q, k, v):
    scores = heads(q) @ heads(k).mT * SCALE
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return joined(powers / powers.sum(-1, keepdim=True) @ heads(v))


def keys_of_two_projections(q, k, v):
    return joined(sdpa(heads(q), heads(k + q), heads(v)))


REFUSED = {
    keys_down: "what surrounds it",
    temperature_from_a_tensor: "what surrounds it",
    addend_kept: "what surrounds it",
    softmax_by_exp: "nothing to quantize",
    keys_of_two_projections: "k comes from 2 linears",
}


@pytest.mark.parametrize("attention", REFUSED)
def test_refused_with_a_reason(attention):
    with pytest.raises(DetectionError, match=REFUSED[attention]) as caught:
        normal(attention)
    assert caught.value.pass_name == "detect_attention"
    if attention is not softmax_by_exp:
        assert "in forward" in caught.value.source
