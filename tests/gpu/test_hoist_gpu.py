"""Weights that a new prompt alone needs, on the host: the same bits, less memory, no waiting."""

from __future__ import annotations

import pytest
import torch

import wancompile
from wancompile import presets
from wancompile.compiled import CompiledModel
from wancompile.recipe import QSpec, Recipe

# Keys and values of 1536 channels: 4.7 MB of merged weights a block in int8, which come and go.
PRESET = presets.truncated(presets.find("t2v-1.3b"), 4)
RECIPE = Recipe("plain", QSpec("int8", smooth=False))


def call(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shaped = presets.example_inputs(PRESET, latent=(3, 16, 16), device="cpu")
    return {
        name: torch.randn(one.shape, generator=draw).to("cuda", one.dtype)
        for name, one in shaped.items()
    }


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    torch.manual_seed(0)
    original = presets.build(PRESET, device="cuda", dtype=torch.bfloat16)
    return wancompile.compile(
        original, recipe=RECIPE, example_inputs=call(0), consume=True, limits=None
    )


def output(model: CompiledModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = model(**inputs, return_dict=False)[0]
    return found


@pytest.mark.parametrize("offload", [False, True])
def test_the_same_bits(cuda, model, offload):
    """Again and again, in turns: a weight that comes late would show in some run."""
    calls = [call(seed) for seed in (1, 2, 3)]
    model.hoist(0)
    expected = [output(model, one) for one in calls]
    model.hoist(2, offload=offload)
    for _ in range(5):
        for one, wanted in zip(calls, expected, strict=True):
            assert torch.equal(output(model, one), wanted)  # three prompts: always computed anew
    for _ in range(3):
        for one, wanted in zip(calls[:2], expected[:2], strict=True):
            assert torch.equal(output(model, one), wanted)


def test_memory_falls_by_what_is_moved(cuda, model):
    model.hoist(0)
    before, whole = torch.cuda.memory_allocated(), model.nbytes
    model.hoist(2, offload=True)
    moved = model.report.hoisting.moved_bytes
    assert moved > 4 * 2 * 1536 * 1536
    assert before - torch.cuda.memory_allocated() > 0.95 * moved
    assert sum(one.nbytes for one in model.buffers() if one.is_cuda) <= whole - moved
    assert not any(model.check(call(1)).broken.values())
    model.hoist(0)
    assert abs(torch.cuda.memory_allocated() - before) < 0.05 * moved


def test_a_known_prompt_waits_for_nothing(cuda, model):
    model.hoist(2, offload=True)
    calls = [call(seed) for seed in (1, 2)]
    for one in calls:
        output(model, one)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for one in calls * 2:
            output(model, one)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_moves_to_the_host_and_back(cuda, model):
    model.hoist(2, offload=True)
    expected = output(model, call(1))
    model.to("cpu")
    assert model.report.hoisting.moved_bytes == 0
    model.to(cuda)
    assert model.report.hoisting.moved_bytes > 0
    assert torch.equal(output(model, call(1)), expected)


def test_what_is_saved_is_whole(cuda, model, tmp_path):
    model.hoist(2, offload=True)
    expected = output(model, call(1))
    model.save(tmp_path / "saved")
    loaded = wancompile.load(tmp_path / "saved", device=cuda)
    assert torch.equal(output(loaded, call(1)), expected)
