"""The less usual Wans through the whole compiler, and models that cannot be captured."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from once import Traced
from torch import Tensor, nn

import wancompile
from wancompile.compiled import CompiledModel
from wancompile.errors import ExportError
from wancompile.export import export
from wancompile.pipeline import relative_error

# With this many faces in one piece, every call of these tests has one.
ONE_PIECE = {"motion_encode_batch_size": 1024}
# The relative L2 error of the output that is allowed: twice the largest that was measured on the
# sizes below (int8 0.0043 to 0.0085, fp8 0.018 to 0.036).
BOUNDS = {"int8": 0.017, "fp8": 0.07}
# Batch, and frames, height and width of the latents.
SIZES = [(1, (3, 12, 8)), (3, (2, 4, 4)), (2, (5, 8, 12)), (1, (4, 6, 10))]


@cache
def original(variant: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model of one block, and one call with a batch of 1."""
    model, call = zoo.make("i2v" if variant == "fused" else variant, 1, batch=1)
    if variant == "fused":
        model.fuse_qkv_projections()
    return model, {**call, **(ONE_PIECE if variant == "animate" else {})}


@cache
def traced(variant: str) -> Traced:
    model, call = original(variant)
    return Traced.on(model, [call])


@cache
def compiled(variant: str, recipe: str) -> CompiledModel:
    """Compile with what one call taught; to fp8 without."""
    found = traced(variant)
    if recipe == "fp8":
        found = replace(found, prepared=replace(found.prepared, stats=None))
    return found.compiled(recipe)


def call_of(variant: str, batch: int, latent: tuple[int, int, int]) -> dict[str, Any]:
    named = "i2v" if variant == "fused" else variant
    return zoo.make(named, 1, batch=batch, latent=latent, seed=batch)[1]


def output(model: nn.Module, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**call, return_dict=False)[0]


CASES = [(variant, recipe) for variant in ("vace", "animate", "fused") for recipe in BOUNDS]


@pytest.mark.parametrize(("variant", "recipe"), CASES)
def test_it_is_close_at_every_size(variant: str, recipe: str) -> None:
    model = compiled(variant, recipe)
    assert model.report.gate is not None
    assert model.report.gate.check.passed
    assert model.report.gate.fallbacks == ()
    for batch, latent in SIZES:
        call = call_of(variant, batch, latent)
        error = relative_error(output(model, call), output(original(variant)[0], call))
        assert BOUNDS[recipe] / 20 < error < BOUNDS[recipe]


@pytest.mark.parametrize("variant", ["vace", "animate", "fused"])
def test_every_group_is_quantized_and_smoothed_where_that_helps(variant: str) -> None:
    report = compiled(variant, "int8").report
    named = "fused_i2v" if variant == "fused" else variant
    found = {(str(group.role), group.members) for group in report.groups}
    assert found == zoo.expected_table(named, 1)
    assert any(group.smoothing and group.smoothing.applied for group in report.groups)


@pytest.mark.parametrize("variant", ["animate", "fused"])
def test_what_is_loaded_gives_the_same_bits(variant: str, tmp_path: Path) -> None:
    model = compiled(variant, "int8")
    model.save(tmp_path / "saved")
    again = wancompile.load(tmp_path / "saved")
    for batch, latent in SIZES[:2]:
        call = call_of(variant, batch, latent)
        assert torch.equal(output(again, call), output(model, call))


# What the example leaves open -------------------------------------------------------------------


def test_one_scale_of_a_control_block_is_not_one_of_a_video() -> None:
    shapes = {spec.name: spec.shape for spec in compiled("vace", "int8").program.signature.inputs}
    assert shapes["control_hidden_states_scale"] == (1,)
    assert shapes["timestep"] == (None,)
    assert shapes["control_hidden_states"][0] is None


def test_faces_have_a_size_of_their_own() -> None:
    shapes = {
        spec.name: spec.shape for spec in compiled("animate", "int8").program.signature.inputs
    }
    assert shapes["face_pixel_values"] == (None, 3, None, 16, 16)
    assert shapes["hidden_states"] == (None, 36, None, None, None)


def where(model: type[nn.Module], text: str) -> str:
    """Return how an error names the line of a model's forward that holds `text`."""
    lines, first = inspect.getsourcelines(model.forward)
    offset = next(at for at, line in enumerate(lines) if text in line)
    return f"test_variants.py, line {first + offset}, in forward"


class Pieces(nn.Module):
    """Sees to its rows in portions; the number of pieces is fixed where the length is open."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([2 * one for one in torch.split(x, self.length)])


def test_one_piece_is_the_whole() -> None:
    program = export(Pieces(64), [{"x": torch.ones(6, 3)}])
    assert "split" not in program.print()
    x = torch.randn(100, 3)
    assert torch.equal(program(x=x), 2 * x)
    with pytest.raises(ExportError, match=r"cut into pieces of 2, .* 3 in this example") as caught:
        export(Pieces(2), [{"x": torch.ones(6, 3)}])
    assert "there is one piece" in caught.value.reason
    assert where(Pieces, "torch.split") in (caught.value.source or "")
    fixed = export(Pieces(2), [{"x": torch.ones(6, 3)}], dynamic=False)
    assert torch.equal(fixed(x=x[:6]), 2 * x[:6])


# What cannot be captured ------------------------------------------------------------------------


class Gated(nn.Module):
    """A Wan that leaves its last block out where the first says so: a branch on a value."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor
    ) -> Any:
        out = self.model(hidden_states, timestep, encoder_hidden_states, return_dict=False)[0]
        if out.abs().mean() > 1:
            return out
        return hidden_states


class Sized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: int(x.sum())] * 2


class Foreign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(x.numpy())


def test_a_branch_on_a_value_says_where_it_is_and_what_to_do() -> None:
    model, call = zoo.make("t2v", 1)
    with pytest.raises(ExportError, match="decides by the values in a tensor") as caught:
        wancompile.compile(Gated(model), [call])
    assert where(Gated, "if out") in (caught.value.source or "")
    assert "torch.where" in caught.value.reason
    assert 'torch.compile(model, backend="wancompile")' in caught.value.reason


@pytest.mark.parametrize(
    ("model", "advice"), [(Sized(), "torch.where"), (Foreign(), "torch's own functions")]
)
def test_other_lines_that_cannot_be_captured(model: nn.Module, advice: str) -> None:
    with pytest.raises(ExportError, match=advice) as caught:
        export(model, [{"x": torch.ones(2, 3)}])
    assert where(type(model), "return") in (caught.value.source or "")


def test_what_the_model_itself_refuses_is_left_in_its_words() -> None:
    model, call = zoo.make("vace", 2)
    call["control_hidden_states_scale"] = torch.ones(3)
    with pytest.raises(ExportError, match=r"should be equal to 2\.\n") as caught:
        wancompile.trace(model, call)
    assert "transformer_wan_vace.py" in (caught.value.source or "")
