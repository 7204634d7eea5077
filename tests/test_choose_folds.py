from __future__ import annotations

import torch.nn.functional as F
from folding import SHAPE, attend, normal
from kit import table
from small import heads, joined, tensors

from wancompile.ir import match
from wancompile.ir.levels import Level
from wancompile.ir.site import Fold
from wancompile.passes.choose_folds import weight_readers

MORE = tensors("w1", "w2", "wk2", "wv2", "wq2", "wo2", seed=11)


def block(self, x):
    """Self-attention, cross-attention to the first tokens, MLP: one group of every fold."""
    states = x[:, :2]
    y = attend(self, F.layer_norm(x, SHAPE) * (1 + self.gain) + self.shift)
    q = heads(F.linear(F.layer_norm(y, SHAPE, self.gain, self.shift), self.wq2))
    k, v = heads(F.linear(states, self.wk2)), heads(F.linear(states, self.wv2))
    y = F.linear(joined(F.scaled_dot_product_attention(q, k, v)), self.wo2)
    return F.linear(F.gelu(F.linear(y, self.w1)), self.w2)


def folds(program):
    return {group.members[0]: (group.fold, group.fold_reason) for group in program.groups}


def test_every_group_has_a_fold_or_a_reason(golden):
    program = normal(block, **MORE)
    assert program.level is Level.NORMAL
    golden(table(program))
    for group in program.groups:
        assert (group.fold is Fold.QUANTIZE) == bool(group.fold_reason)


def test_shared_values_are_not_folded_into():
    def fn(self, x):
        return attend(self, attend(self, x))

    found = folds(normal(fn))
    reason = "a value projection's weight is used more than once"
    assert found["wo"] == found["wo#1"] == (Fold.QUANTIZE, reason)


def test_shared_out_projection_does_not_matter_to_the_place():
    def fn(self, x):
        return F.linear(attend(self, x) * 2, self.wo)

    assert folds(normal(fn))["wo"][0] is Fold.VALUE_ROWS


def test_two_groups_of_one_norm_leave_it_alone():
    def fn(self, x):
        y = F.layer_norm(x, SHAPE, self.gain, self.shift)
        q, k, v = (heads(F.linear(y, weight)) for weight in (self.wq2, self.wk2, self.wv2))
        return attend(self, y) + joined(F.scaled_dot_product_attention(q, k, v))

    found = folds(normal(fn, **MORE))
    assert found["wq"][0] is found["wq2"][0] is Fold.QUANTIZE
    assert "reads the norm too" in found["wq"][1]


def test_readers_of_each_weight_are_counted():
    def fn(self, x):
        return attend(self, x) + F.linear(x, self.wv) + F.linear(x, self.wq * 2)

    counts = weight_readers(match.by_site(normal(fn).graph))
    assert counts["wv"] == 2
    assert counts["wk"] == counts["wo"] == 1
