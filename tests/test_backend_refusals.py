"""What the backend refuses, and the graphs that it leaves as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from captured import attending, compiled, error, quantizations, refused, run
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from wancompile.errors import InputError, NumericsError
from wancompile.pipeline import relative_error

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_a_weight_that_is_not_finite_is_named() -> None:
    model, inputs = zoo.make("t2v", 1)
    with torch.no_grad():
        model.blocks[0].ffn.net[2].weight[3, 5] = torch.nan
    found = refused(compiled(model), inputs)
    assert isinstance(found, NumericsError)
    assert found.site == "blocks.0.ffn.net.2.weight"


def test_a_call_that_wants_gradients_is_refused() -> None:
    model, inputs = zoo.make("t2v", 1)
    quantized = compiled(model)
    with pytest.raises(BackendCompilerFailed, match=r"call the model under\s+torch.inference_mode"):
        quantized(**inputs)
    model.requires_grad_(False)
    assert relative_error(quantized(**inputs).sample, run(model, inputs)) < 0.03


def test_dropout_is_refused_where_it_drops() -> None:
    model, inputs = zoo.make("t2v", 1)
    model.train()
    assert error(compiled(model), model, inputs) < 0.03
    torch._dynamo.reset()
    model.blocks[0].attn2.to_out[1].p = 0.1
    found = refused(compiled(model), inputs)
    assert isinstance(found, InputError)
    assert "call model.eval()" in found.reason
    assert found.site == "blocks.0.attn2.to_out.1"
    assert found.source is not None


class Casting(nn.Module):
    def __init__(self, model: nn.Module, enabled: bool) -> None:
        super().__init__()
        self.model = model
        self.enabled = enabled

    def forward(self, **inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.model(**inputs, return_dict=False)[0]


def test_autocast_is_refused_where_it_casts() -> None:
    model, inputs = zoo.make("t2v", 1)
    assert error(compiled(Casting(model, enabled=False)), model, inputs) < 0.03
    inside = refused(compiled(Casting(model, enabled=True)), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        around = refused(compiled(model), inputs)
    assert inside.reason == around.reason
    assert "model.to(torch.bfloat16)" in around.reason


def test_weights_without_values_are_refused() -> None:
    model, inputs = attending()
    call = {name: tensor.to("meta") for name, tensor in inputs.items()}
    assert "meta device" in refused(compiled(model.to("meta")), call).reason


class Router(nn.Module):
    """A softmax, but nothing that it mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.gate(x), -1)


@pytest.mark.parametrize("make", [Router, lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU())])
def test_a_graph_without_attention_runs_as_it_is(
    make: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model, x = make().requires_grad_(False), torch.randn(3, 4)
    assert torch.equal(compiled(model)(x), model(x))
    assert "runs as it is" in caplog.text
    assert quantizations(caplog) == 0


def test_a_graph_without_attention_may_be_trained() -> None:
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    compiled(model)(x).sum().backward()
    torch.testing.assert_close(model.weight.grad, x.sum(0).expand(4, 4))
