from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from folding import SCALE, TENSORS, attend, folded, group_of, input_of, normal, place, project
from kit import error
from small import CHANNELS, X, heads, joined, tensors

from wancompile.ir import match, text
from wancompile.ir.site import Fold, Role
from wancompile.passes.folds import value_rows

sdpa = F.scaled_dot_product_attention
MORE = {
    **tensors("wk2", "wv2", "bv2", seed=2),
    "wqkv": torch.randn(3 * CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(5)) / 3,
    "bqkv": torch.linspace(-1, 1, 3 * CHANNELS),
    "wkv2": torch.randn(2 * CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(6)) / 3,
    "w_flat": torch.randn(5, 12 * CHANNELS, generator=torch.Generator().manual_seed(8)) / 12,
    "w_one_head": torch.randn(4, CHANNELS, generator=torch.Generator().manual_seed(7)) / 3,
}


def out(self, y):
    return F.linear(y, self.wo, self.bo)


def plain(self, x):
    return attend(self, x)


def no_bias(self, x):
    q, k, _ = project(self, x)
    return out(self, joined(sdpa(q, k, heads(F.linear(x, self.wv)))))


def second(self, x):
    """Keys and values of another projection of the same value."""
    return heads(F.linear(x, self.wk2)), heads(F.linear(x, self.wv2, self.bv2))


def sum_of_two(self, x):
    q, k, v = project(self, x)
    return out(self, joined(sdpa(q, k, v)) + joined(sdpa(q, *second(self, x))))


def sum_before_joining(self, x):
    q, k, v = project(self, x)
    return out(self, joined(sdpa(q, k, v) + sdpa(q, *second(self, x))))


def fused(self, x):
    q, k, v = F.linear(x, self.wqkv, self.bqkv).chunk(3, -1)
    return out(self, joined(sdpa(heads(q), heads(k), heads(v))))


def fused_in_halves(self, x):
    q, k, v = project(self, x)
    k2, v2 = F.linear(x, self.wkv2).chunk(2, -1)
    return out(self, joined(sdpa(q, k, v)) + joined(sdpa(q, heads(k2), heads(v2))))


def counted_from_the_end(self, x):
    q, k, _ = project(self, x)
    return out(self, joined(sdpa(q, k, heads(F.linear(x, self.wkv2)[..., -12:]))))


def shared_values(self, x):
    """Two attentions read the same values: their rows are scaled once, not twice."""
    q, k, v = project(self, x)
    return out(self, joined(sdpa(q, k, v)) + joined(sdpa(q, second(self, x)[0], v)))


def written_out(self, x):
    q, k, v = project(self, x)
    return out(self, joined(torch.softmax(q @ k.mT, -1) @ v))


def merged(self, x):
    q, k, v = (t.flatten(0, 1) for t in project(self, x))
    return out(self, joined(sdpa(q, k, v).unflatten(0, (x.shape[0], -1))))


FOLDABLE = {
    plain: ["wv"],
    no_bias: ["wv"],
    sum_of_two: ["wv", "wv2"],
    sum_before_joining: ["wv", "wv2"],
    fused: ["wqkv"],
    fused_in_halves: ["wkv2", "wv"],
    counted_from_the_end: ["wkv2"],
    shared_values: ["wv"],
    written_out: ["wv"],
    merged: ["wv"],
}


@pytest.mark.parametrize("fn", [plain, fused])
def test_scale_goes_into_rows(fn, golden):
    before = normal(fn, **MORE)
    golden(text.diff(before.print(), folded(before, Role.ATTN_OUT, value_rows).print()))


@pytest.mark.parametrize("fn", FOLDABLE)
def test_every_value_projection_is_found(fn):
    found = value_rows.find(*place(normal(fn, **MORE), Role.ATTN_OUT))
    assert sorted(str(match.site(linear)) for linear, _ in found.projections) == FOLDABLE[fn]
    offsets = {str(match.site(linear)): offset for linear, offset in found.projections}
    assert offsets.pop("wqkv", 24) == 24
    assert offsets.pop("wkv2", 12) == 12
    assert not any(offsets.values())


@pytest.mark.parametrize("fn", FOLDABLE)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_the_function_stays(fn, dtype, limit):
    before = normal(fn, dtype, **MORE)
    after = folded(before, Role.ATTN_OUT, value_rows)
    x = torch.randn(3, 7, CHANNELS, dtype=dtype)
    assert group_of(before, Role.ATTN_OUT).fold is Fold.VALUE_ROWS
    assert error(after, fn, x, **TENSORS, **MORE) < limit
    read = input_of(after, Role.ATTN_OUT, x) * SCALE
    torch.testing.assert_close(read.to(dtype), input_of(before, Role.ATTN_OUT, x))


def test_values_in_bf16():
    after = folded(normal(sum_of_two, torch.bfloat16, **MORE), Role.ATTN_OUT, value_rows)
    assert error(after, sum_of_two, X.bfloat16(), **TENSORS, **MORE) < 3e-2


def values_read_elsewhere(self, x):
    q, k, v = project(self, x)
    return out(self, joined(sdpa(q, k, v))) + v.sum()


def values_are_keys(self, x):
    q, k, _ = project(self, x)
    return out(self, joined(sdpa(q, k, k)))


def values_are_keys_of_the_other_attention(self, x):
    q, k, v = project(self, x)
    return out(self, joined(sdpa(q, k, v)) + joined(sdpa(q, v, second(self, x)[1])))


def without_heads(self, x):
    k = F.linear(x, self.wk, self.bk)
    return out(self, sdpa(F.linear(x, self.wq), k, k))


def output_read_elsewhere(self, x):
    y = joined(sdpa(*project(self, x)))
    return out(self, y) + y


def one_output_read_elsewhere(self, x):
    q, k, v = project(self, x)
    y = joined(sdpa(q, k, v))
    return out(self, y + joined(sdpa(q, *second(self, x)))) + y


def a_number_added(self, x):
    return out(self, joined(sdpa(*project(self, x))) + 1.0)


def heads_in_another_order(self, x):
    """Channels of a head are not neighbours: [B, S, D, H]."""
    q, k, _ = project(self, x)
    v = F.linear(x, self.wv).unflatten(-1, (4, 3)).permute(0, 3, 1, 2)
    return out(self, joined(sdpa(q, k, v)))


def channels_mixed_after(self, x):
    y = sdpa(*project(self, x))
    return out(self, y.permute(0, 2, 3, 1).flatten(2))


def tokens_become_channels(self, x):
    y = sdpa(*project(self, x))
    return out(self, y.transpose(2, 3).reshape(x.shape[0], -1, CHANNELS))


def attention_among_channels(self, x):
    q, k, v = (F.linear(x, weight).mT for weight in (self.wq, self.wk, self.wv))
    return out(self, sdpa(q, k, v).mT)


def twelve_tokens(self, x):
    return x[:, :1] + self.wk2


def channels_arrive_as_tokens(self, x):
    return out(self, joined(sdpa(*project(self, twelve_tokens(self, x)))).mT)


def tokens_join_the_channels(self, x):
    y = sdpa(*project(self, twelve_tokens(self, x)))
    return F.linear(y.flatten(1), self.w_flat)


def normed_values(self, x):
    q, k, v = project(self, x)
    return out(self, joined(sdpa(q, k, F.layer_norm(v, (4,)))))


def values_times_a_vector(self, x):
    q, k, v = project(self, x)
    return out(self, joined(sdpa(q, k, v * 2.0)))


def one_head_of_values(self, x):
    """The values of one head serve all: there are fewer rows than output channels."""
    q, k, _ = project(self, x)
    v = F.linear(x, self.w_one_head).unflatten(-1, (1, 4)).transpose(1, 2)
    return out(self, joined(torch.softmax(q @ k.mT, -1) @ v))


def overlapping_slices(self, x):
    q, k, _ = project(self, x)
    both = F.linear(x, self.wkv2)
    one, two = heads(both[..., :12]), heads(both[..., 4:16])
    return out(self, joined(sdpa(q, k, one)) + joined(sdpa(q, k, two)))


def slice_read_elsewhere(self, x):
    q, k, _ = project(self, x)
    both = F.linear(x, self.wkv2)
    return out(self, joined(sdpa(q, k, heads(both[..., 12:])))) + both[..., 6:18]


def weight_used_twice(self, x):
    q, k, v = project(self, x)
    return out(self, joined(sdpa(q, k, v))) + F.linear(x * 2, self.wv)


REFUSED = {
    values_read_elsewhere: "another reader on the way",
    values_are_keys: "another reader on the way",
    values_are_keys_of_the_other_attention: "another reader on the way",
    without_heads: "also read elsewhere",
    output_read_elsewhere: "another reader on the way",
    one_output_read_elsewhere: "another reader on the way",
    a_number_added: "not made of attention outputs alone",
    heads_in_another_order: "cannot be followed through aten.scaled_dot_product_attention",
    channels_mixed_after: "cannot be followed through aten.reshape",
    tokens_become_channels: "cannot be followed",
    attention_among_channels: "cannot be followed through aten.scaled_dot_product_attention",
    channels_arrive_as_tokens: "do not arrive as the last dimension",
    tokens_join_the_channels: "cannot be followed through aten.reshape",
    normed_values: "not made of attention outputs alone",
    values_times_a_vector: "not made of attention outputs alone",
    one_head_of_values: "cannot be followed through aten.scaled_dot_product_attention",
    overlapping_slices: "share some rows",
    slice_read_elsewhere: "also read elsewhere",
    weight_used_twice: "a value projection's weight is used more than once",
}


@pytest.mark.parametrize("fn", REFUSED)
def test_why_not(fn):
    group = group_of(normal(fn, **MORE), Role.ATTN_OUT)
    assert group.fold is Fold.QUANTIZE
    assert REFUSED[fn] in group.fold_reason
