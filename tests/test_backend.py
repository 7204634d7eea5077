"""The backend of torch.compile, on whole models and on what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import clone
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import wancompile
from wancompile.backend.names import Names
from wancompile.errors import (
    CalibrationError,
    InputError,
    NumericsError,
    RecipeError,
    WancompileError,
)
from wancompile.pipeline import relative_error
from wancompile.recipe import QSpec, Recipe, Rule

Counts = Mapping[str, int]


@pytest.fixture(autouse=True)
def _dynamo(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Start every test with nothing compiled, and keep what the backend logs."""
    caplog.set_level(logging.INFO, "wancompile")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, *, dynamic: bool = False, **options: Any) -> Callable[..., Any]:
    """Compile `model`; `dynamic` for every size, which takes dynamo five times as long."""
    return torch.compile(
        model, backend="wancompile", fullgraph=True, dynamic=dynamic, options=options or None
    )


def run(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out if isinstance(out, Tensor) else out.sample


def error(model: Callable[..., Any], original: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    return relative_error(run(model, inputs), run(original, inputs))


def ran(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Counts:
    """Return how often each of the compiler's ops runs in one call, as torch's profiler sees it.

    Beside them, as "linear", the linears in floating point.
    """
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.inference_mode():
        model(**inputs)
        with torch.profiler.profile(activities=[cpu]) as profile:
            model(**inputs)
    return {
        one.key.partition("::")[2]: one.count
        for one in profile.key_averages()
        if one.key.startswith("wancompile::") or one.key == "aten::linear"
    }


def linears(model: nn.Module) -> int:
    """Return how many linears a model has."""
    return sum(isinstance(one, nn.Linear) for one in model.modules())


def quantizations(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.msg.startswith("compiled a graph") for record in caplog.records)


def refused(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> WancompileError:
    """Return the backend's own error out of the one that dynamo wraps around it."""
    with pytest.raises(BackendCompilerFailed) as caught:
        run(model, inputs)
    found = caught.value.inner_exception
    assert isinstance(found, WancompileError)
    assert str(found) in str(caught.value)
    return found


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


# Options --------------------------------------------------------------------------------------


def test_the_recipe_decides() -> None:
    model, inputs = zoo.make("t2v", 1)
    recipe = Recipe("mine", QSpec("fp8"), (Rule("ffn_*", None),))
    quantized = compiled(model, recipe=recipe)
    counts = ran(quantized, inputs)
    assert counts["scaled_linear"] == 5  # q, k, v; k, v; one q and two outputs
    assert counts["linear"] == linears(model) - 8
    assert 0.005 < error(quantized, model, inputs) < 0.1


def test_statistics_of_a_file_smooth_as_compile_does(tmp_path: Path) -> None:
    model, inputs = zoo.make("i2v", 1)
    stats = wancompile.calibrate(model, [inputs, zoo.example("i2v", 1)])
    file = tmp_path / "stats.safetensors"
    stats.save(file)
    other = wancompile.compile(model, stats=stats, example_inputs=inputs)
    assert any(group.smoothing.applied for group in other.report.groups)
    out = run(compiled(model, stats=file), inputs)
    torch.testing.assert_close(out, run(other, inputs), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    assert relative_error(out, run(compiled(model), inputs)) > 1e-3


def test_statistics_allow_8_bit_attention() -> None:
    model, inputs = zoo.make("t2v", 1)
    stats = wancompile.calibrate(model, [inputs])
    quantized = compiled(model, recipe="int8-attention", stats=stats)
    assert ran(quantized, inputs)["scaled_attention"] == 1
    assert error(quantized, model, inputs) < 0.05


def test_attention_scales_need_statistics() -> None:
    model, inputs = attending()
    found = refused(compiled(model, recipe="int8-attention"), inputs)
    assert isinstance(found, CalibrationError)
    assert "options={'stats': ...}" in found.reason


def test_statistics_of_another_model_are_refused() -> None:
    wan, inputs = zoo.make("t2v", 1)
    loom = clone.from_wan(wan)
    stats = wancompile.calibrate(loom, [clone.arguments(inputs)])
    assert isinstance(refused(compiled(wan, stats=stats), inputs), CalibrationError)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"recipes": "int8"},
            InputError,
            "unknown option 'recipes'; there are recipe, stats, inductor",
        ),
        ({"recipe": 8}, InputError, "recipe is a name or a Recipe, not int"),
        ({"stats": {}}, InputError, "stats is a Stats or the path of one, not dict"),
        ({"inductor": "yes"}, InputError, "inductor is True or False, not 'yes'"),
        ({"stats": "/nowhere"}, CalibrationError, "/nowhere"),
        ({"recipe": "int9"}, RecipeError, "no recipe 'int9'"),
    ],
)
def test_an_option_that_is_wrong_is_named(
    options: dict[str, Any], kind: type[WancompileError], message: str
) -> None:
    model, inputs = attending()
    found = refused(compiled(model, **options), inputs)
    assert isinstance(found, kind)
    assert message in found.reason


def test_a_rule_that_matches_nothing_is_told_what_is_near() -> None:
    model, inputs = zoo.make("t2v", 1)
    recipe = Recipe("mine", QSpec("int8"), (Rule("blocks.7.*", None),))
    found = refused(compiled(model, recipe=recipe), inputs)
    assert isinstance(found, RecipeError)
    assert "nearest are blocks.0." in found.reason


def test_a_mode_is_refused() -> None:
    model, inputs = attending()
    found = refused(torch.compile(model, backend="wancompile", mode="max-autotune"), inputs)
    assert "no mode 'max-autotune'" in found.reason


class Attending(nn.Module):
    """Self-attention between a norm and a sum: the smallest model there is something to do for."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            one.unflatten(-1, (2, 8)).transpose(1, 2) for one in self.qkv(self.norm(x)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return torch.sin(x + self.out(mixed.transpose(1, 2).flatten(2))) * 2


def attending() -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the smallest model and a call of it."""
    return Attending().requires_grad_(False), {"x": torch.randn(2, 5, 16)}


def test_inductor_compiles_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = attending()
    calls = [torch.randn(batch, tokens, 16) for batch, tokens in ((2, 5), (3, 9), (2, 8))]
    expected = [compiled(model, dynamic=True)(x) for x in calls]
    torch._dynamo.reset()
    counters.clear()
    quantized = compiled(model, dynamic=True, inductor=True)
    for x, plain in zip(calls, expected, strict=True):
        torch.testing.assert_close(quantized(x), plain, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    # The sine and the product are Inductor's now; the compiler's products are called as they are.
    assert counters["inductor"]["extern_calls"] >= 2
    model.out.weight.mul_(2)
    changed = compiled(model, dynamic=True)
    assert relative_error(quantized(calls[0]), changed(calls[0])) < 1e-5
    assert quantizations(caplog) == 4


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


def test_a_weight_that_is_not_finite_is_named() -> None:
    model, inputs = zoo.make("t2v", 1)
    with torch.no_grad():
        model.blocks[0].ffn.net[2].weight[3, 5] = torch.nan
    found = refused(compiled(model), inputs)
    assert isinstance(found, NumericsError)
    assert found.site == "blocks.0.ffn.net.2.weight"


# What is refused, and what is left alone ---------------------------------------------------------


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
