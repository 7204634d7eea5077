"""GPTQ on the device where weights are rounded, against the plain loop there and on the CPU."""

import pytest
import torch

from wancompile.quant import gptq
from wancompile.quant.gptq import Feedback, round_weight
from wancompile.quant.numerics import FP8, INT8, absmax_scale

DTYPES = [INT8, FP8]


def weight_and_inputs(n: int, k: int, device: torch.device):
    weight = torch.randn(n, k, device=device) / k**0.5
    weight[:, :: max(1, k // 4)] *= 30
    x = torch.randn(512, 16, device=device) @ torch.randn(16, k, device=device)
    return weight, x + 0.3 * torch.randn(512, k, device=device)


def loss(weight, q, x) -> float:
    """The squared error of the product, in fp64."""
    error = weight.double() - q.data.double() * q.scale.double()
    return float((x.double() @ error.T).square().sum())


def plainly(monkeypatch):
    monkeypatch.setattr(gptq, "lacks_type", lambda device, dtype: "the plain loop is wanted")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (130, 300), (1536, 1536)])
def test_the_kernel_rounds_as_the_plain_loop_does(cuda, dtype, shape, monkeypatch):
    """Sums in another order may tip a value over, after which its row goes its own way."""
    weight, x = weight_and_inputs(*shape, cuda)
    given = weight, 0.9 * absmax_scale(weight, -1, dtype), dtype, Feedback.of(x)
    found = round_weight(*given)
    plainly(monkeypatch)
    wanted = round_weight(*given)
    assert loss(weight, found, x) == pytest.approx(loss(weight, wanted, x), rel=0.02)
    close = (found.data.float() - wanted.data.float()).abs() <= 1 + wanted.data.float().abs() / 8
    assert close.float().mean() > 0.99
    first = given[3].order[0]  # it has nothing to make up for
    assert torch.equal(found.data[:, first].float(), wanted.data[:, first].float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_rounds_as_well_as_a_cpu(cuda, dtype):
    weight, x = weight_and_inputs(64, 200, cuda)
    scale = absmax_scale(weight, -1, dtype)
    found = round_weight(weight, scale, dtype, Feedback.of(x))
    wanted = round_weight(weight.cpu(), scale.cpu(), dtype, Feedback.of(x.cpu()))
    assert loss(weight, found, x) == pytest.approx(loss(weight.cpu(), wanted, x.cpu()), rel=0.05)
