"""What counts as surely better."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wancompile.quant.judge import Losses, different, halves, refusal


def losses(lost, total=1.0):
    lost = torch.as_tensor(lost, dtype=torch.float32)
    return Losses(lost, torch.full_like(lost, total))


def test_the_error_is_that_of_all_tokens_together():
    exact = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    actual = exact + torch.tensor([[0.3, 0.0], [0.0, -0.4]])
    assert Losses.of(actual, exact).error == pytest.approx(0.1)
    assert Losses.of(exact, exact).error == 0


def test_a_steady_gain_is_believed():
    before = torch.rand(64) + 1
    assert refusal(losses(before), losses(0.8 * before), 0.03) == ""


def test_what_is_not_lower_is_refused():
    before = torch.rand(64) + 1
    for after in (before, 1.1 * before, math.nan * before):
        assert refusal(losses(before), losses(after), 0.03) == "does not lower the calibrated error"
    assert refusal(losses(math.nan * before), losses(before), 0.03)
    assert refusal(losses(0 * before), losses(0 * before), 0.03)


def test_a_small_gain_is_refused_however_many_tokens_show_it():
    before = torch.ones(4096)
    reason = refusal(losses(before), losses(0.98**2 * before), 0.03)
    assert reason == "lowers the calibrated error by 2.0 % only"


def test_a_gain_of_single_tokens_is_refused():
    before, after = torch.ones(16), torch.ones(16)
    before[3] = 20  # all of the gain
    reason = refusal(losses(before), losses(after), 0.03)
    assert reason.endswith("which 16 tokens do not prove")
    assert refusal(losses(before[3:4]), losses(after[3:4]), 0.03)


def test_a_gain_of_all_tokens_is_believed_although_one_has_most_of_the_loss():
    """Few words of text, one of which is loud: by absolute losses nothing could ever be proved."""
    before = torch.tensor([400.0, 1.0, 2.0, 1.5, 0.5, 3.0])
    after = before * torch.tensor([0.01, 0.03, 0.02, 0.01, 0.05, 0.02])
    assert refusal(losses(before), losses(after)) == ""
    after[1:] = before[1:]  # all others gain nothing
    assert refusal(losses(before), losses(after)).endswith("which 6 tokens do not prove")


def test_small_gains_of_all_tokens_do_not_prove_a_large_one_of_one():
    before = torch.ones(16)
    before[3] = 20
    after = 0.97 * before
    after[3] = 1
    assert refusal(losses(before), losses(after)).endswith("which 16 tokens do not prove")


def test_gains_from_nothing_but_chance_are_mostly_refused():
    draws = torch.rand(500, 2, 32, generator=torch.Generator().manual_seed(0)).add(0.5)
    believed = sum(not refusal(losses(a), losses(b), 0.0) for a, b in draws)
    assert 0 < believed < 0.05 * len(draws)


@given(
    rows=st.lists(st.integers(0, 5), max_size=20),
    width=st.integers(1, 4),
)
@settings(deadline=None, max_examples=60)
def test_each_different_row_is_kept_once_where_it_came_first(rows, width):
    tokens = torch.tensor(rows, dtype=torch.float32)[:, None].repeat(1, width)
    found = different(tokens)
    assert found.shape[1] == width
    assert found[:, 0].tolist() == list(dict.fromkeys(map(float, rows)))


def test_copies_with_other_last_bits_are_one_token():
    """The first channel is nothing but last bits, and the second as large as all the others."""
    token = torch.randn(1, 32)
    token[0, :2] = torch.tensor([0.0, 100.0])
    copies = token * (1 + 1e-6 * torch.randn(50, 32))
    copies[:, 0] = 1e-7 * torch.randn(50)
    assert len(copies.unique(dim=0)) == 50
    assert torch.equal(different(copies), copies[:1])
    assert len(different(torch.cat([copies, torch.randn(2, 32), 0 * token]))) == 50 + 3
    assert len(different(torch.cat([copies, torch.randn(2, 32)]))) == 3


def test_a_large_channel_that_all_share_hides_no_token():
    tokens = torch.randn(20, 32)
    tokens[:, 7] = 1e5
    assert torch.equal(different(tokens), tokens)


def test_halves_take_turns():
    first, second = halves(torch.arange(5, dtype=torch.bfloat16)[:, None])
    assert first.flatten().tolist() == [0, 2, 4]
    assert second.flatten().tolist() == [1, 3]
    assert first.dtype == torch.float32
