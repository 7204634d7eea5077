from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fusing import called_fused, calls
from kit import Function, counts, error, run_pass

from wancompile.passes import FuseResidual
from wancompile.pipeline import relative_error

C = 16
BF16 = torch.bfloat16
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(2, 20, C, generator=DRAW)
TENSORS = {
    "gate": torch.randn(C, generator=DRAW),
    "table": torch.randn(6, C, generator=DRAW),
    "spread": torch.randn(6, C, generator=DRAW),
}


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def branch(x):
    return torch.tanh(x.flip(1))


def times(x):
    return wide(x).mean(1, keepdim=True)


def per_video(self, x):
    return (wide(x) + branch(x) * (times(x) * self.gate)).type_as(x)


def per_channel(self, x):
    return (branch(x) * self.gate + wide(x)).type_as(x)


def per_token(self, x):
    return (wide(x) + (wide(x).flip(2) * self.gate) * branch(x)).type_as(x)


def in_the_type_of_the_stream(self, x):
    return x + branch(x) * self.gate


def from_a_table(self, x):
    embedded = wide(x.unsqueeze(2) * self.spread)
    gate = (self.table + embedded).chunk(6, dim=2)[4].squeeze(2)
    return (wide(x) + branch(x) * gate).type_as(x)


GATED = (per_video, per_channel, per_token, in_the_type_of_the_stream, from_a_table)


def needed(fn, dtype=torch.float32):
    return {name: one.to(dtype) for name, one in TENSORS.items() if name in fn.__code__.co_names}


def program(fn, x=X, **tensors):
    return called_fused(fn, x, **tensors)


def fused(fn, x=X, **tensors):
    return run_pass(program(fn, x, **tensors), FuseResidual())


def test_a_gated_sum_becomes_one_op(golden):
    x = X.to(BF16)
    golden(fused(per_video, x, **needed(per_video, BF16)).print("canonical"))


@pytest.mark.parametrize("fn", GATED)
def test_every_gate_keeps_its_values(fn):
    tensors = needed(fn)
    after = fused(fn, **tensors)
    assert counts(after)["add_gated"] == 1
    assert counts(after).get("add", 0) == 0
    assert error(after, fn, X, **tensors) < 1e-6


@pytest.mark.parametrize("fn", GATED)
def test_bf16_sums_are_rounded_once(fn):
    x, tensors = X.to(BF16), needed(fn, BF16)
    after, before = fused(fn, x, **tensors), program(fn, x, **tensors)
    assert counts(after)["add_gated"] == 1
    ours, theirs = (error(one, fn, x, **tensors) for one in (after, before))
    assert ours < 1.02 * theirs
    # The sum is as good as bf16 can hold: nothing between its operands and it is rounded.
    with torch.no_grad():
        wanted = fn(Function(fn, **tensors).double(), x.double())
    best = relative_error(wanted.to(BF16), wanted)
    assert ours < 1.5 * best


def test_a_table_becomes_an_offset():
    tensors = needed(from_a_table)
    after = fused(from_a_table, **tensors)
    ((_, _, _, offset, _),) = calls(after, "add_gated")
    torch.testing.assert_close(after.state[offset.target], TENSORS["table"][4])


def test_each_sum_of_a_row_is_fused():
    def fn(self, x):
        first = per_video(self, x)
        return per_channel(self, torch.sin(first) + first)

    after = fused(fn, gate=TENSORS["gate"])
    assert (counts(after)["add_gated"], counts(after)["add"]) == (2, 1)
    assert error(after, fn, X, gate=TENSORS["gate"]) < 1e-6


# What must not be fused ------------------------------------------------------------------------


def without_a_gate(self, x):
    return x + branch(x)


def by_a_number(self, x):
    return x + branch(x) * 0.5


def by_alpha(self, x):
    return torch.add(x, branch(x) * self.gate, alpha=2)


def by_one_number_a_token(self, x):
    return x + branch(x) * x[..., :1]


def of_one_token(self, x):
    return x + branch(x)[:, :1] * self.gate


def of_another_type(self, x):
    return x + (branch(x) * self.gate).double()


def of_heads(self, x):
    return (x.unflatten(-1, (4, 4)) + branch(x).unflatten(-1, (4, 4)) * self.gate[:4]).flatten(2)


def of_whole_numbers(self, x):
    return (x.to(torch.int32) + branch(x).to(torch.int32) * self.gate.to(torch.int32)).float()


def shift_per_token(self, x):
    """The modulation of a norm: the stream is normed, and nothing is added to it."""
    n = F.layer_norm(x, (C,), eps=1e-6)
    return n * (1 + times(x) * self.gate) + x.flip(2)


def affine_gain(self, x):
    return x.flip(2) + self.gate * F.layer_norm(x, (C,))


@pytest.mark.parametrize(
    "fn",
    [
        without_a_gate,
        by_a_number,
        by_alpha,
        by_one_number_a_token,
        of_one_token,
        of_another_type,
        of_heads,
        of_whole_numbers,
        shift_per_token,
        affine_gain,
    ],
)
def test_what_is_no_gated_sum_stays(fn):
    before = program(fn, **needed(fn))
    after = run_pass(before, FuseResidual())
    assert after.print() == before.print()


def test_a_sum_that_is_read_before_it_is_rounded_stays():
    """The unrounded sum is needed all the same, and the rounded one costs no product then."""

    def fn(self, x):
        total = wide(x) + branch(x) * (times(x) * self.gate)
        return total.type_as(x), total.sum(1)

    x = X.to(BF16)
    before = program(fn, x, gate=TENSORS["gate"].to(BF16))
    assert run_pass(before, FuseResidual()).print() == before.print()
