"""Compiled models that torch exports with the kernels of a GPU in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.export import Dim

import wancompile
from wancompile import presets
from wancompile.compiled import CompiledModel
from wancompile.errors import InputError
from wancompile.recipe import QSpec, Recipe

PRESET = presets.truncated(presets.find("t2v-1.3b"), 1)
RECIPE = Recipe("plain", QSpec("int8", smooth=False))
SIZES = [(2, (3, 16, 16)), (3, (5, 24, 8))]


def call(at: int) -> dict[str, torch.Tensor]:
    batch, latent = SIZES[at]
    draw = torch.Generator().manual_seed(at)
    shaped = presets.example_inputs(PRESET, batch=batch, latent=latent, device="cpu")
    return {
        name: torch.randn(one.shape, generator=draw).to("cuda", one.dtype)
        for name, one in shaped.items()
    }


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    torch.manual_seed(0)
    original = presets.build(PRESET, device="cuda", dtype=torch.bfloat16)
    return wancompile.compile(original, recipe=RECIPE, example_inputs=call(0), limits=None)


def test_what_is_exported_and_saved_gives_the_same_bits(cuda, model, tmp_path: Path):
    shapes: dict[str, dict[int, object] | None] = {
        name: dict.fromkeys((0, 2, 3, 4) if one.dim() == 5 else (0,), Dim.AUTO)
        for name, one in call(0).items()
    }
    exported = torch.export.export(
        model,
        (),
        {**call(0), "return_dict": False},
        dynamic_shapes={**shapes, "return_dict": None},
    )
    targets = {str(node.target) for node in exported.graph.nodes}
    assert any(target.startswith("wancompile_kernels.") for target in targets)
    torch.export.save(exported, tmp_path / "exported.pt2")
    loaded = torch.export.load(tmp_path / "exported.pt2").module()
    for at in range(len(SIZES)):
        found = loaded(**call(at), return_dict=False)[0]
        assert torch.equal(found, model(**call(at), return_dict=False)[0])


def test_weights_on_the_host_are_not_exported(cuda, model):
    model.hoist(offload=True)
    try:
        with pytest.raises(InputError, match=r"call hoist\(\) before torch.export"):
            torch.export.export(model, (), call(0))
    finally:
        model.hoist()
