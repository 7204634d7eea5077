"""What counts as surely better."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wancompile.quant.judge import Losses, different, halves, refusal
from wancompile.quant.numerics import FP8, INT8, absmax, quantize_weight
from wancompile.quant.rounding import choose_rounding
from wancompile.quant.search import Weights, choose


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


# Smoothing, clipping and GPTQ on tokens that neither chose nor judged -------------------------


def drawn(seed: int):
    """A weight `[24, 32]`, 8 to 64 tokens to choose and judge by, and 256 fresh ones.

    Channels may differ in size, be mixed, and tokens be loud or quiet: one seed in each way.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    seen = (8, 10, 64)[seed % 3]
    sizes = ((0.0, 0.5, 1.5)[seed // 3 % 3] * normal(32)).exp()
    mixed = torch.eye(32) + 0.3 * (seed % 2) * normal(32, 32)
    loud = (0.8 * (seed // 2 % 2) * normal(seen + 256, 1)).exp()
    x = loud * (normal(seen + 256, 32) @ mixed) * sizes
    return normal(24, 32) / sizes, x[:seen], x[seen:]


def in_8_bits(x, weight, q):
    """The relative error of the product of inputs, rounded per token, and a weight, in fp64."""
    rounded = quantize_weight(x, q.data.dtype).dequantize().double()
    exact = x.double() @ weight.double().T
    return float((rounded @ q.dequantize().double().T - exact).norm() / exact.norm())


def smoothed(weight, tokens, fresh, dtype):
    """The error with the scale found, and whether it was kept."""
    found = choose(absmax(tokens, 0), Weights.of([weight], len(weight)), tokens, dtype)
    scaled = weight * found.best.scale
    error = in_8_bits(fresh / found.best.scale, scaled, quantize_weight(scaled, dtype))
    return error, found.helps


def better_rounded(weight, tokens, fresh, dtype):
    """The error with clipping and GPTQ as they were kept, and whether either was."""
    found = choose_rounding(weight, tokens, dtype, clip=True, gptq=True)
    if found is None:
        return math.nan, False
    return in_8_bits(fresh, weight, found.weight), found.how.clipped or found.how.gptq


@pytest.mark.parametrize("dtype", [INT8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("feature", [smoothed, better_rounded])
def test_what_is_kept_harms_no_fresh_token(feature, dtype):
    kept = []
    for seed in range(72):
        weight, tokens, fresh = drawn(seed)
        error, was_kept = feature(weight, tokens, fresh, dtype)
        if was_kept:
            kept.append(error / in_8_bits(fresh, weight, quantize_weight(weight, dtype)))
    assert max(kept) < 1.02
    assert sum(kept) < 0.98 * len(kept)
