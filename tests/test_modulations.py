"""Modulations with a row per token that are cut from a stored table and an embedding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusing import assert_nearest, assert_neighbours, calls, errors, program
from kit import run_pass

from wancompile.ir import match
from wancompile.passes import FuseNorm

C = 16
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(2, 20, C, generator=DRAW) * 2 + 1
TENSORS = {
    name: torch.randn(6, C, generator=DRAW) for name in ("table", "spread", "other", "wider")
} | {"short": torch.randn(6, 1, generator=DRAW)}


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def normed(x):
    return F.layer_norm(wide(x), (C,), eps=1e-6)


def embedded(self, x):
    """[B, S, 6, C]; the tokens of the first half are alike."""
    half = x.shape[1] // 2
    rows = torch.where(torch.arange(x.shape[1])[:, None] < half, x[:, :1], x)
    return rows.unsqueeze(2) * self.spread


def cut(six, index):
    return six.chunk(6, dim=2)[index].squeeze(2)


def all_three(self, x):
    six = self.table + wide(embedded(self, x))
    total = (wide(x) + torch.tanh(x) * cut(six, 2)).type_as(x)
    return (normed(total) * (1 + cut(six, 1)) + cut(six, 0)).type_as(x), total


def selected(self, x):
    six = wide(embedded(self, x)) + self.table
    return (normed(x) * (six[:, :, 3] + 1) + six.select(2, -1)).type_as(x)


def fused(fn, x=X, dtype=torch.float32):
    return run_pass(program(fn, x, **needed(fn, dtype)), FuseNorm())


def needed(fn, dtype=torch.float32):
    names = {*fn.__code__.co_names, *embedded.__code__.co_names}
    return {name: one.to(dtype) for name, one in TENSORS.items() if name in names}


def test_the_table_is_stored_as_offsets_and_its_sum_is_not_made():
    after = fused(all_three)
    ((_, _, *six, _, _, _, _),) = calls(after, "residual_norm_quantize")
    offsets = [after.state[one.target] for one in six[1::2]]
    for offset, row, one in zip(offsets, (2, 1, 0), (0, 1, 0), strict=True):
        torch.testing.assert_close(offset, TENSORS["table"][row] + one)
    assert "table" not in after.state
    assert_nearest(after, all_three, X, **needed(all_three))
    assert_neighbours(after, program(all_three, X, **needed(all_three)), X)


def test_places_are_also_selected():
    after = fused(selected)
    ((_, _, scale, _, shift, *_),) = calls(after, "norm_quantize")
    torch.testing.assert_close(after.state[scale.target], TENSORS["table"][3] + 1)
    torch.testing.assert_close(after.state[shift.target], TENSORS["table"][5])
    assert_nearest(after, selected, X, **needed(selected))


def test_places_are_counted_from_the_end():
    def fn(self, x):
        six = self.table + embedded(self, x)
        return normed(x) * six[:, :, -2:-1].squeeze(2)

    after = fused(fn)
    ((_, _, offset, *_),) = calls(after, "norm_quantize")
    torch.testing.assert_close(after.state[offset.target], TENSORS["table"][4])
    assert_nearest(after, fn, X, **needed(fn))


def test_an_embedding_in_bf16_is_read_as_it_is():
    x, tensors = X.to(torch.bfloat16), needed(all_three, torch.bfloat16)
    after = fused(all_three, x, torch.bfloat16)
    ((_, _, gate, *_),) = calls(after, "residual_norm_quantize")
    assert match.val(gate).dtype == torch.bfloat16
    ours, theirs = (
        errors(one, all_three, x, **tensors) for one in (after, program(all_three, x, **tensors))
    )
    assert all(one < 1.02 * other for one, other in zip(ours, theirs, strict=True))


# What is not taken apart -----------------------------------------------------------------------


def of_a_scaled_sum(self, x):
    return normed(x) * cut(torch.add(self.table, embedded(self, x), alpha=2), 1)


def plus_a_scaled_number(self, x):
    return normed(x) * torch.add(cut(self.table + embedded(self, x), 1), 1, alpha=3)


def of_a_number_for_all_channels(self, x):
    return normed(x) * cut(self.short + embedded(self, x), 1)


def of_a_computed_table(self, x):
    return normed(x) * cut(self.table * x.mean() + embedded(self, x), 1)


def of_a_product(self, x):
    return normed(x) * cut(self.table * embedded(self, x), 1)


def of_one_number_a_token(self, x):
    return normed(x) * cut(self.table + embedded(self, x)[..., :1], 1)


def of_two_places(self, x):
    six = self.table + embedded(self, x)
    return normed(x) * six[:, :, 1:3].sum(2)


@pytest.mark.parametrize(
    "fn",
    [
        of_a_scaled_sum,
        plus_a_scaled_number,
        of_a_number_for_all_channels,
        of_a_computed_table,
        of_a_product,
        of_one_number_a_token,
        of_two_places,
    ],
)
def test_other_modulations_are_read_as_they_are(fn):
    after = fused(fn)
    ((_, _, offset, *_),) = calls(after, "norm_quantize")
    assert offset is None
    assert_nearest(after, fn, X, **needed(fn))
