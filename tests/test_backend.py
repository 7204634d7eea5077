"""The backend of torch.compile on whole models: sizes, names, and weights that change."""

from __future__ import annotations

import clone
import pytest
import torch
import zoo
from captured import compiled, error, linears, quantizations, ran, run
from torch import Tensor, nn

from wancompile.backend.names import Names
from wancompile.pipeline import relative_error

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# Whole models ---------------------------------------------------------------------------------

VARIANTS = ["flf2v", "ti2v", "vace", "fused_i2v"]  # of t2v, test_recompiles has more sizes


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_compilation_serves_every_size(variant: str, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = zoo.make(variant, 1)
    quantized = compiled(model, dynamic=True)
    assert 1e-4 < error(quantized, model, inputs) < 0.03
    with torch.compiler.set_stance("fail_on_recompile"):
        assert error(quantized, model, zoo.example(variant, 1, batch=3)) < 0.03
    assert quantizations(caplog) == 1


@pytest.mark.parametrize("variant", ["i2v", "vace"])
def test_every_linear_of_a_group_runs_in_8_bits(variant: str) -> None:
    model, inputs = zoo.make(variant, 1)
    table = zoo.expected_table(variant, 1)
    counts = ran(compiled(model), inputs)
    assert counts["scaled_linear"] == len(table)  # one product for each group
    assert counts["linear"] == linears(model) - sum(len(members) for _, members in table)
    # Both kinds of block of a VACE read the same text states.
    shared = sum(role == "attn_kv_proj" for role, _ in table) - 1
    assert counts["quantize_per_token"] == len(table) - shared


@pytest.mark.parametrize(
    ("style", "dynamic"), [("matmul", True), ("einsum", False), ("bmm", False)]
)
def test_the_clone(style: clone.Style, dynamic: bool) -> None:
    wan, inputs = zoo.make("i2v", 1)
    loom = clone.from_wan(wan, clone.Taste(style, long_gelu=True))
    quantized, call = compiled(loom, dynamic=dynamic), clone.arguments(inputs)
    assert 1e-4 < relative_error(run(quantized, call), run(wan, inputs)) < 0.03
    table, counts = clone.expected_table_clone(1, photo=True), ran(quantized, call)
    assert counts["scaled_linear"] == len(table)
    assert counts["linear"] == linears(wan) - sum(len(members) for _, members in table)


class Scaled(nn.Module):
    """A model whose output is scaled by a float of the call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, scale: float, **inputs: Tensor) -> Tensor:
        return scale * self.model(**inputs, return_dict=False)[0]


def test_a_number_may_change_from_call_to_call(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = zoo.make("t2v", 1)
    quantized = compiled(Scaled(model), dynamic=True)
    with torch.no_grad():
        twice, thrice, more = (quantized(scale, **inputs) for scale in (2.0, 3.0, 4.5))
    assert relative_error(twice / 2, run(model, inputs)) < 0.03
    torch.testing.assert_close(thrice, 1.5 * twice)
    torch.testing.assert_close(more, 2.25 * twice)
    assert quantizations(caplog) == 1


def test_blocks_that_share_a_graph_have_their_own_weights(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inputs = zoo.make("t2v", 3)
    expected = run(model, inputs)
    model.compile_repeated_blocks(backend="wancompile", fullgraph=True, dynamic=True)
    for _ in range(2):
        assert 1e-4 < relative_error(run(model, inputs), expected) < 0.03
    assert quantizations(caplog) == 3


# Weights --------------------------------------------------------------------------------------


def test_weights_that_change_in_place_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = zoo.make("t2v", 1)
    quantized = compiled(model)
    before = run(quantized, inputs)
    zoo.randomize(model, torch.Generator().manual_seed(7))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert error(quantized, model, inputs) < 0.03
        assert relative_error(run(quantized, inputs), before) > 0.5
    assert quantizations(caplog) == 2


def test_weights_that_are_replaced_are_noticed() -> None:
    model, inputs = zoo.make("t2v", 1)
    quantized = compiled(model)
    before = run(quantized, inputs)
    other, _ = zoo.make("t2v", 1, seed=9)
    model.load_state_dict(other.state_dict(), assign=True)
    assert error(quantized, other, inputs) < 0.03
    assert relative_error(run(quantized, inputs), before) > 0.5


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = zoo.make("t2v", 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(compiled(model), inputs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spellings", "names"),
    [
        (
            ["L['self']._modules['blocks']._modules['0']._parameters['w']", "L['self'].blocks.0"],
            ["blocks.0.w", "blocks.0"],
        ),
        (
            ["L['a']._parameters['w']", "L['b']._modules['c']._buffers['w']"],
            ["a.w", "b.c.w"],
        ),
        (["L['args'][0]"], ["L.args.0"]),
    ],
)
def test_names_are_those_of_the_outermost_module(spellings: list[str], names: list[str]) -> None:
    found = Names.of_modules_in(spellings)
    assert [found.name(one) for one in spellings] == names
