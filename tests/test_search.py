"""The search for a smooth scale, on data made so that the best answer is known."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wancompile.ir.site import Span
from wancompile.quant.numerics import FP8, INT8
from wancompile.quant.search import Probe, Weights, choose, smooth_scale


def outlier_data(sigma: float, tokens: int = 64, k: int = 32, n: int = 48):
    """Tokens whose channels differ in size, and a weight that makes up for it."""
    factor = (sigma * torch.randn(k)).exp()
    return torch.randn(tokens, k) * factor, torch.randn(n, k) / factor


def weights(*each):
    return Weights.of(each, sum(len(one) for one in each))


def output_error(x, weight, dtype, scale):
    return Probe(x, weight, dtype).losses(scale).error


@pytest.mark.parametrize("sigma", [1.0, 1.5, 2.0])
def test_int8_with_outliers_is_won_back(sigma):
    x, weight = outlier_data(sigma)
    choice = choose(x.abs().amax(0), weights(weight), x, INT8)
    even_x, even_weight = outlier_data(0.0)
    without_outliers = output_error(even_x, even_weight, INT8, None)
    assert choice.helps
    assert choice.error_plain > 3 * without_outliers
    assert choice.error_smoothed < 1.3 * without_outliers


def test_errors_are_those_of_the_tokens_that_did_not_choose():
    x, weight = outlier_data(1.5)
    choice = choose(x.abs().amax(0), weights(weight), x, INT8)
    for scale, error in ((1.0, choice.error_plain), (choice.best.scale, choice.error_smoothed)):
        assert error == pytest.approx(int8_error(x[1::2] / scale, weight * scale), rel=1e-4)


def int8_error(x, weight):
    """The error of rounding both factors to int8 per row, in fp64."""
    exact = x.double() @ weight.double().T
    rounded = in_int8(x.double()) @ in_int8(weight.double()).T
    return float((rounded - exact).norm() / exact.norm())


def in_int8(x):
    step = x.abs().amax(1, keepdim=True) / 127
    return (x / step).round() * step


def test_the_scale_is_made_of_the_spans_and_exponents_that_are_told():
    x, weight = outlier_data(1.5)
    best = choose(x.abs().amax(0), weights(weight), x, INT8).best
    spans_x = {Span.AMAX: x.abs().amax(0), Span.RMS: x[0::2].square().mean(0).sqrt()}
    spans_w = {Span.AMAX: weight.abs().amax(0), Span.RMS: weight.square().mean(0).sqrt()}
    scale = smooth_scale(spans_x[best.span_x], spans_w[best.span_w], best.alpha, best.beta)
    torch.testing.assert_close(best.scale, scale)


SPANS = {
    Span.AMAX: lambda x, dim: x.abs().amax(dim),
    Span.RMS: lambda x, dim: x.square().mean(dim).sqrt(),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("correlated", [False, True])
def test_no_scale_of_a_fine_grid_is_much_better(seed, correlated):
    torch.manual_seed(seed)
    x, weight = outlier_data(1.0, tokens=128, k=48, n=64)
    if correlated:
        x = x @ torch.eye(48).add(0.3 * torch.randn(48, 48))
    best = choose(x.abs().amax(0), weights(weight), x, INT8).best
    probe = Probe(x[0::2], weight, INT8)
    exponents = torch.linspace(0, 1, 11).tolist()
    fine = [
        probe.losses(smooth_scale(of_x(x[0::2], 0), of_w(weight, 0), alpha, beta)).error
        for of_x in SPANS.values()
        for of_w in SPANS.values()
        for alpha in exponents
        for beta in exponents
    ]
    assert probe.losses(best.scale).error < 1.02 * min(fine)


def test_one_loud_token_does_not_decide():
    """A channel that is loud once says little of its size; its root mean square does."""
    x, weight = outlier_data(1.0, tokens=256, k=32, n=64)
    x[torch.arange(32) * 2, torch.randperm(32)] *= 30
    best = choose(x.abs().amax(0), weights(weight), x, INT8).best
    assert best.span_x is Span.RMS


def test_a_scale_that_fits_only_the_tokens_that_chose_it_is_not_taken():
    x = torch.randn(64, 16).sign() * 1.0
    weight = torch.randn(24, 16).sign() * 1.0
    x[0::2, 0] *= 50
    choice = choose(x.abs().amax(0), weights(weight), x, INT8)
    trained = [output_error(x[0::2], weight, INT8, s) for s in (None, choice.best.scale)]
    assert trained[1] < trained[0]
    assert choice.error_smoothed > choice.error_plain
    assert not choice.helps


def test_exact_data_needs_no_scale():
    x, weight = torch.randn(32, 16).sign(), torch.randn(8, 16).sign()
    choice = choose(x.abs().amax(0), weights(weight), x, INT8)
    assert choice.error_plain < 1e-6
    assert not choice.helps


def test_a_little_gain_is_refused():
    x, weight = torch.randn(64, 32), torch.randn(48, 32)
    x[:, 0] *= 1.5
    choice = choose(x.abs().amax(0), weights(weight), x, FP8)
    assert 0.95 * choice.error_plain < choice.error_smoothed
    assert choice.refusal
    assert not choice.helps


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_tokens_never_help(broken):
    x, weight = outlier_data(1.5)
    x[1, 3] = broken
    assert not choose(x.abs().amax(0), weights(weight), x, INT8).helps


def test_copies_of_a_token_do_not_judge_it():
    """Four different tokens, each seen sixteen times: all that is known are four."""
    x, weight = outlier_data(1.5, tokens=4)
    choice = choose(x.abs().amax(0), weights(weight), x.repeat(16, 1), INT8)
    expected = int8_error(x[1::2], weight)
    assert choice.error_plain == pytest.approx(expected, rel=1e-4)
    assert choose(x.abs().amax(0), weights(weight), x[:3].repeat(16, 1), INT8) is None


def test_too_few_tokens_judge_nothing():
    x, weight = outlier_data(1.5, tokens=3)
    assert choose(x.abs().amax(0), weights(weight), x, INT8) is None
    x, weight = outlier_data(1.5, tokens=4)
    assert choose(x.abs().amax(0), weights(weight), x, INT8) is not None


def test_many_outputs_are_sampled_and_few_are_not():
    x, weight = outlier_data(1.5, n=600)
    choice = choose(x.abs().amax(0), weights(weight), x, FP8)
    every_third = output_error(x[1::2], weight[::3], FP8, None)
    assert choice.error_plain == pytest.approx(every_third, rel=1e-6)


@given(
    k=st.integers(1, 40),
    alpha=st.floats(0.05, 1),
    beta=st.floats(0, 1),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=60)
def test_live_channels_have_geometric_mean_one_and_dead_ones_are_one(k, alpha, beta, seed):
    generator = torch.Generator().manual_seed(seed)
    amax, weight_amax = (torch.rand(k, generator=generator).add(0.1) for _ in range(2))
    dead = torch.rand(k, generator=generator) < 0.3
    amax[dead & (torch.arange(k) % 2 == 0)] = 0
    weight_amax[dead & (torch.arange(k) % 2 == 1)] = 0
    scale = smooth_scale(amax, weight_amax, alpha, beta)
    assert (scale > 0).all()
    assert (scale[dead] == 1).all()
    if not dead.all():
        assert float(scale[~dead].log().mean()) == pytest.approx(0, abs=1e-5)
    live = (amax[~dead] ** alpha / weight_amax[~dead] ** beta).log()
    assert torch.allclose(live - live.mean(), scale[~dead].log(), atol=1e-4)


def test_scales_stay_in_the_range_of_fp16():
    amax, weight_amax = torch.tensor([1e30, 1.0, 1e-20]), torch.ones(3)
    scale = smooth_scale(amax, weight_amax, 1.0, 0.0)
    assert scale.max() <= 1e4
    assert scale.min() >= 1e-4


def test_weights_are_stacked_over_their_outputs():
    a, b = torch.randn(2, 5), torch.randn(3, 5)
    both = weights(a, b)
    assert torch.equal(both.amax, torch.cat([a, b]).abs().amax(0))
    torch.testing.assert_close(both.rms, torch.cat([a, b]).square().mean(0).sqrt())
    assert torch.equal(both.rows, torch.cat([a, b]))


def test_weights_are_let_go_of_one_by_one():
    alive = []

    def made():
        for _ in range(4):
            weight = torch.randn(6, 5)
            alive.append(weakref.ref(weight))
            assert sum(one() is not None for one in alive) <= 2
            yield weight
            del weight

    Weights.of(made(), 24)
    assert not any(one() is not None for one in alive)
