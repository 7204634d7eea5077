"""Weights that a new prompt alone needs, on the host: the same bits, less memory, no waiting."""

from __future__ import annotations

import pytest
import torch

import wancompile
from wancompile import hoist, presets
from wancompile.compiled import CompiledModel
from wancompile.pipeline import relative_error
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


# LoRAs beside weights on the host --------------------------------------------------------------

TEXT = ("condition_embedder.text_embedder.linear_1", "attn2.to_k", "attn2.to_v")
"""Linears of a prompt alone, the first in floating point; `ffn.net.2` stands for all others."""


def lora(rank: int, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA of a tenth or so of the weights, for linears on either side of the cut."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for path, part in presets.build(PRESET).named_modules():
        if isinstance(part, torch.nn.Linear) and path.endswith((*TEXT, "ffn.net.2")):
            rows, columns = part.weight.shape
            down = torch.randn(rank, columns, generator=draw) / columns**0.5
            found[f"{path}.lora_A.weight"] = down
            found[f"{path}.lora_B.weight"] = 0.1 * torch.randn(rows, rank, generator=draw)
    return found


def unload_all(model: CompiledModel) -> None:
    for name in model.loras:
        model.unload_lora(name)


def loaded_one_after_the_other(model: CompiledModel) -> list[torch.Tensor]:
    """Outputs after each step; 256 directions make factors that do not stay on the device."""
    found = []
    for step in (
        lambda: model.load_lora(lora(8, seed=1), name="a"),
        lambda: model.load_lora(lora(8, seed=2), name="a"),
        lambda: model.load_lora(lora(256, seed=3), name="b", scale=0.5),
        lambda: model.set_lora({"a": 0.5, "b": 1.0}),
        lambda: model.unload_lora("a"),
    ):
        step()
        found += [output(model, call(1)), output(model, call(2))]
    return found


def alone(model: CompiledModel) -> dict[str, torch.Tensor]:
    """What a new prompt alone needs of what the model runs with."""
    parts = hoist.split(model.program, hoist.find(model.fused).inputs)
    return {name: model.program.state[name] for name in parts.alone}


def test_loras_give_the_same_bits(cuda, model):
    """Loaded while weights are away, and what is loaded before goes with them."""
    model.hoist(0)
    expected = loaded_one_after_the_other(model)
    assert not any(torch.equal(one, two) for one, two in zip(expected, expected[2:], strict=False))
    try:
        model.hoist(2, offload=True)
        # There is room for one LoRA where there was for two: sums run in another order.
        assert relative_error(output(model, call(2)), expected[-1]) < 0.01
        unload_all(model)
        model.hoist(2, offload=True)  # and for none
        bare = model.report.hoisting.moved_bytes
        for found, wanted in zip(loaded_one_after_the_other(model), expected, strict=True):
            assert torch.equal(found, wanted)
        waiting = alone(model)
        assert any(name.startswith("low_rank.") for name in waiting)
        assert not any(one.is_cuda for one in waiting.values())
        assert all(one.is_pinned() for one in waiting.values())
        others = [one for name, one in model.program.state.items() if name not in waiting]
        assert all(one.is_cuda for one in others if one.numel() > 1)
        assert model.report.hoisting.moved_bytes > bare
        model.to("cpu")
        model.to(cuda)
        assert relative_error(output(model, call(2)), expected[-1]) < 0.01
    finally:
        unload_all(model)


def test_another_lora_in_the_same_room_takes_no_memory(cuda, model):
    model.hoist(2, offload=True)
    try:
        model.load_lora(lora(8, seed=1))
        expected = output(model, call(1))
        program, before = model.program, torch.cuda.memory_allocated()
        model.load_lora(lora(8, seed=2))
        output(model, call(1))
        model.load_lora(lora(8, seed=1))
        assert torch.equal(output(model, call(1)), expected)
        assert model.program is program
        assert torch.cuda.memory_allocated() - before < 1 << 20
    finally:
        unload_all(model)


def test_merging_while_weights_are_away(cuda, model):
    """The same weights as merged where they are; they go away again."""
    here, away = (
        CompiledModel(model.fused.to(cuda), model.report, model.config, model.dtype)
        for _ in range(2)
    )
    away.hoist(2, offload=True)
    for one in (here, away):
        one.merge_lora(lora(8, seed=1))
    assert torch.equal(output(away, call(1)), output(here, call(1)))
    assert not any(one.is_cuda for one in alone(away).values())
