"""The simulation of 8-bit self-attention, against arithmetic in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import small
import torch
import torch.nn.functional as F
from small import normal

from benchmarks.attention_accuracy import CELLS, RECIPES_AS_CHOICES
from benchmarks.attention_choices import (
    CHOICES,
    Choice,
    Ranges,
    Simulated,
    attend,
    plain_ranges,
    range_of,
    ranges_of,
    rounded_p,
    rounded_qk,
)
from wancompile import pipeline
from wancompile.calibrate import Calibration
from wancompile.ops.hadamard import turned
from wancompile.passes import QuantizeAttention
from wancompile.recipe import ATTENTIONS, Recipe

SHAPE = (2, 3, 200, 16)
FACTOR = 16**-0.5


@pytest.fixture
def qkv():
    """q, k and v with a wide channel, and k and v off centre."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    width = torch.ones(SHAPE[-1])
    width[5] = 6.0
    return q * width, k * width + 1.5, v + 2.0


def ranges(q, k, v):
    return Ranges(*(range_of(one) for one in (q, k, v, turned(q), turned(k))))


def exact(q, k, v):
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=FACTOR)


def error(qkv, choice):
    expected = exact(*qkv)
    actual = attend(*qkv, FACTOR, choice, ranges(*qkv)).double()
    return float((actual - expected).norm() / expected.norm())


def test_nothing_rounded_is_attention(qkv):
    assert error(qkv, Choice()) < 1e-6


@pytest.mark.parametrize("label", [one for one in CELLS if one != "exact"])
def test_every_cell_rounds_and_stays_near(qkv, label):
    assert 1e-5 < error(qkv, CELLS[label]) < 0.25


@pytest.mark.parametrize("centre", ["middle", "mean"])
def test_a_centred_v_comes_back(qkv, centre):
    """Rounded to bf16 it has an error of a tenth of a percent, forgotten it would have one of 1."""
    assert error(qkv, Choice(v="bf16", v_centre=centre)) < 2e-3


@pytest.mark.parametrize("turn", CHOICES["turn"])
def test_turned_q_and_k_have_the_product_they_had(qkv, turn):
    q, k, v = qkv
    choice = Choice(qk="int8", turn=turn, q_scale="token", k_scale="token")
    rounded_q, rounded_k = rounded_qk(q, k, choice, ranges(q, k, v))
    products, expected = rounded_q @ rounded_k.mT, q @ k.mT
    assert (products - expected).norm() < 0.02 * expected.norm()
    assert (turn == "none") == bool((rounded_q - q).norm() < 0.1 * q.norm())


def test_a_finer_scale_has_a_smaller_error(qkv):
    head, block, token = (
        error(qkv, Choice(qk="int8", q_scale=one, k_scale=one))
        for one in ("head", "block", "token")
    )
    assert token < block < head


def test_turning_spreads_a_wide_channel(qkv):
    """What all channels share would gather in the first one: it is subtracted."""
    token = Choice(qk="int8", q_scale="token", k_scale="token", k_centre="mean")
    assert error(qkv, replace(token, turn="hadamard")) < 0.7 * error(qkv, token)


def test_clipping_the_ranges_is_seen(qkv):
    assert error(qkv, Choice(qk="int8", clip=0.5)) > 3 * error(qkv, Choice(qk="int8"))


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("kind", "steps"), [("int8", 127), ("uint8", 255)])
def test_weights_are_counts_of_their_blocks_largest(kind, steps, block):
    weights = torch.rand(2, 1, 3, 200, generator=torch.Generator().manual_seed(1)).square()
    rounded, total = rounded_p(weights.clone(), Choice(p=kind, p_block=block))
    for before, after in zip(weights.split(block, -1), rounded.split(block, -1), strict=True):
        step = before.amax(-1, keepdim=True) / steps
        torch.testing.assert_close(after, (before / step).round() * step)
    torch.testing.assert_close(total, rounded.sum(-1, keepdim=True))


def test_dither_keeps_the_sum_of_small_weights():
    """Weights of a fifth of a step all become 0, or one of five of them becomes a step."""
    weights = torch.full((1, 1, 1, 128), 0.2 / 255)
    weights[..., 0] = 1.0
    plain, _ = rounded_p(weights.clone(), Choice(p="uint8"))
    dithered, _ = rounded_p(weights.clone(), Choice(p="uint8-dither"))
    assert plain[..., 1:].sum() == 0
    assert dithered[..., 1:].sum() == pytest.approx(float(weights[..., 1:].sum()), rel=0.05)


def test_own_sum_of_fp8_weights():
    weights = torch.rand(1, 1, 4, 50, generator=torch.Generator().manual_seed(2))
    for kind, by_own in (("fp8", False), ("fp8-same-sum", True)):
        rounded, total = rounded_p(weights.clone(), Choice(p=kind))
        torch.testing.assert_close(total, (rounded if by_own else weights).sum(-1, keepdim=True))
        torch.testing.assert_close(rounded * 256, (weights * 256).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_simulation_of_a_recipe_is_what_the_compiled_attention_computes(name):
    program = normal(small.attend, **small.WEIGHTS)
    calibration = Calibration(program)
    calibration(x=small.X)
    stats = calibration.stats()
    ranges = ranges_of(program, stats, plain_ranges(program, [{"x": small.X}]))
    recipe = Recipe("attention", None, attention=ATTENTIONS[name])
    compiled = pipeline.run(program, [QuantizeAttention(recipe, stats)])(x=small.X)
    (simulated,) = Simulated(program, ranges, RECIPES_AS_CHOICES[name])(x=small.X)
    exact = program(x=small.X)
    assert pipeline.relative_error(simulated, exact) > 1e-3
    # A few P are on the other side of a tie; there are five keys.
    assert pipeline.relative_error(compiled, simulated) < 2e-4


def test_plain_ranges_are_those_of_q_and_k():
    program = normal(small.attend, **small.WEIGHTS)
    found = plain_ranges(program, [{"x": small.X}, {"x": 2 * small.X}])
    ((q, k),) = found.values()
    for one, (weight, bias) in ((q, ("wq", "bq")), (k, ("wk", "bk"))):
        both = torch.cat([small.X, 2 * small.X])
        heads = small.heads(F.linear(both, small.WEIGHTS[weight], small.WEIGHTS[bias]))
        torch.testing.assert_close(one.amax, heads.abs().amax((0, 2)))
        torch.testing.assert_close(one.middle, (heads.amax((0, 2)) + heads.amin((0, 2))) / 2)


def test_a_choice_that_there_is_not():
    with pytest.raises(ValueError, match="p is one of"):
        Choice(p="int4")
