"""GPTQ against rounding to nearest, and against the definition in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wancompile.quant import gptq
from wancompile.quant.gptq import Feedback, round_weight
from wancompile.quant.numerics import FP8, INT8, absmax_scale, quantize_weight

DTYPES = [INT8, FP8]


def correlated(tokens: int, k: int, rank: int = 4, noise: float = 0.1):
    return torch.randn(tokens, rank) @ torch.randn(rank, k) + noise * torch.randn(tokens, k)


def rounded(weight, dtype, x):
    return round_weight(weight, absmax_scale(weight, -1, dtype), dtype, Feedback.of(x))


def loss(weight, q, x):
    """The squared error of the product, in fp64."""
    error = weight.double() - q.data.double() * q.scale.double()
    return float((x.double() @ error.T).square().sum())


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    k=st.integers(1, 40),
    n=st.integers(1, 9),
    gains=st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_uncorrelated_inputs_give_nearest_bit_for_bit(dtype, k, n, gains):
    """Whatever the sizes of the channels, and the order that they make."""
    generator = torch.Generator().manual_seed(gains)
    weight = torch.randn(n, k, generator=generator)
    x = torch.diag(torch.rand(k, generator=generator) + 0.1)
    q, nearest = rounded(weight, dtype, x), quantize_weight(weight, dtype)
    assert torch.equal(q.data.float(), nearest.data.float())
    assert torch.equal(q.scale, nearest.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    k=st.integers(32, 300),
    n=st.integers(8, 16),
    rank=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_correlated_inputs_lose_less_than_with_nearest(dtype, k, n, rank, seed):
    torch.manual_seed(seed)
    weight, x = torch.randn(n, k), correlated(64, k, rank, noise=0.01)
    lost, before = (
        loss(weight, q, x) for q in (rounded(weight, dtype, x), quantize_weight(weight, dtype))
    )
    assert lost < 0.6 * before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [7, 128, 129, 300])
def test_each_column_makes_up_for_those_before_it(dtype, k):
    """The definition: the rest of the columns minimizes the loss, given what was rounded."""
    weight, x = torch.randn(5, k), correlated(2 * k, k, noise=1.0)
    scale = absmax_scale(weight, -1, dtype)
    feedback = Feedback.of(x)
    q = round_weight(weight, scale, dtype, feedback)
    gram = x.double().T @ x.double() / len(x)
    gram += 0.01 * gram.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    order = feedback.order.tolist()
    error = weight.double() - q.data.double() * q.scale.double()
    for place in {0, 1, k // 2, k - 1}:
        before, at, after = order[:place], order[place], order[place + 1 :]
        # min over the later errors of e H e^T leaves the Schur complement of their part.
        open_ = [*before, at]
        rest = gram[open_][:, open_]
        if after:
            cross = gram[open_][:, after]
            rest = rest - cross @ torch.linalg.solve(gram[after][:, after], cross.T)
        wanted = weight[:, at].double() + error[:, before] @ (rest[:-1, -1] / rest[-1, -1])
        step = (wanted - q.data[:, at].double() * q.scale[:, 0].double()).abs()
        half = q.scale[:, 0].double() * (0.5 if dtype == INT8 else 1e9)
        limit = q.scale[:, 0].double() * (127 if dtype == INT8 else 448)
        inside = wanted.abs() <= limit
        assert (step <= half * (1 + 1e-3))[inside].all()
        if dtype == FP8:
            assert (step <= wanted.abs() * 2.0**-4 + q.scale[:, 0].double() * 2.0**-9)[inside].all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_size_of_blocks_does_not_matter(dtype, monkeypatch):
    weight, x = torch.randn(8, 150), correlated(200, 150, noise=1.0)
    whole = rounded(weight, dtype, x)
    monkeypatch.setattr(gptq, "_BLOCK", 1000)
    again = rounded(weight, dtype, x)
    same = (whole.data.float() == again.data.float()).float().mean()
    assert same > 0.99  # sums in another order may tip a value over
    assert loss(weight, again, x) == pytest.approx(loss(weight, whole, x), rel=0.02)


def test_scales_stay_and_int8_leaves_minus_128_out():
    weight, x = torch.randn(6, 64), correlated(32, 64)
    scale = 0.5 * absmax_scale(weight, -1, INT8)
    q = round_weight(weight, scale, INT8, Feedback.of(x))
    assert torch.equal(q.scale, scale)
    assert q.data.dtype == INT8
    assert q.data.shape == weight.shape
    assert int(q.data.min()) >= -127


def test_loud_channels_come_first():
    x = torch.randn(32, 5) * torch.tensor([1.0, 9.0, 3.0, 0.0, 27.0])
    assert Feedback.of(x).order.tolist() == [4, 1, 2, 0, 3]


@pytest.mark.parametrize(
    "x",
    [torch.zeros(8, 16), torch.full((8, 16), torch.nan), torch.full((8, 16), 1e30)],
    ids=["zero", "nan", "too large"],
)
def test_inputs_that_teach_nothing_give_nearest(x):
    weight = torch.randn(4, 16)
    assert torch.equal(rounded(weight, INT8, x).data, quantize_weight(weight, INT8).data)


def test_one_token_is_enough_to_learn_something():
    weight, x = torch.randn(16, 64), torch.randn(1, 64)
    nearest = quantize_weight(weight, INT8)
    assert loss(weight, rounded(weight, INT8, x), x) < 0.2 * loss(weight, nearest, x)
