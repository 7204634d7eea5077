"""LoRAs on compiled models: as near to the float model with the same LoRA as without any."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import loras
import pytest
import torch
from rescale import inject_outliers
from torch import Tensor, nn

import wancompile
from wancompile.compiled import CompiledModel
from wancompile.demo import checkpoints
from wancompile.demo.conditions import prompt, text_states
from wancompile.errors import ArtifactError, InputError, LoraError
from wancompile.ir import match
from wancompile.pipeline import relative_error
from wancompile.recipe import QSpec, Recipe, Rule


@dataclass(frozen=True)
class Subject:
    """A trained model with outlier channels, cut to its first block, and compiled."""

    float: nn.Module
    compiled: CompiledModel
    call: dict[str, Tensor]

    def fresh(self) -> CompiledModel:
        """The compiled model anew, for changes that stay; the weights are shared."""
        one = self.compiled
        return CompiledModel(one._fused, one.report, one.config, one.dtype)

    def error(self, model: Any, reference: nn.Module) -> float:
        return relative_error(self.run(model), self.run(reference))

    def run(self, model: Any) -> Tensor:
        with torch.no_grad():
            return model(**self.call, return_dict=False)[0]


def call(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 1, 5, 16, 16, generator=generator),
        "timestep": 1000 * torch.rand(2, generator=generator),
        "encoder_hidden_states": text_states([prompt(seed), ""]),
    }


def subject_of(recipe: str | Recipe) -> Subject:
    model = checkpoints.load("t2v")
    del model.blocks[1:]
    inject_outliers(model)
    data = [call(seed) for seed in (1, 2)]
    compiled = wancompile.compile(copy.deepcopy(model), data, recipe, limits=None)
    return Subject(model, compiled, call(3))


@pytest.fixture(scope="module", params=["int8", "fp8"])
def subject(request) -> Subject:
    return subject_of(request.param)


@pytest.fixture(scope="module", params=["int8", "fp8"])
def nearest(request) -> Subject:
    """Weights rounded to nearest, which is what merging does to those that it touches."""
    return subject_of(Recipe("nearest", QSpec(request.param)))


@pytest.fixture(scope="module")
def mixed() -> Subject:
    """One group in floating point, whose rows smoothing has scaled all the same; one static."""
    static = Rule("ffn_down_proj", QSpec("int8", activation="static"))
    return subject_of(Recipe("mixed", QSpec("int8"), (Rule("attn_qkv_proj", None), static)))


@pytest.fixture
def model(subject) -> Iterator[CompiledModel]:
    """The compiled model, which has no LoRA before and after."""
    assert not subject.compiled.loras
    yield subject.compiled
    for name in subject.compiled.loras:
        subject.compiled.unload_lora(name)


@pytest.mark.parametrize("rank", [4, 32])
def test_a_branch_is_as_near_as_the_model_without(subject, model, rank):
    lora = loras.random(subject.float, rank)
    reference = loras.with_lora(subject.float, (1.0, lora))
    without = subject.error(model, subject.float)
    assert subject.error(model, reference) > 2 * without  # it is no small thing to miss
    model.load_lora(loras.as_peft(lora))
    assert subject.error(model, reference) < 1.15 * without


@pytest.mark.parametrize("rank", [4, 32])
def test_merged_it_is_as_near_with_the_original_and_a_little_farther_without(nearest, rank):
    lora = loras.random(nearest.float, rank)
    reference = loras.with_lora(nearest.float, (1.0, lora))
    without = nearest.error(nearest.compiled, nearest.float)
    exact, twice = nearest.fresh(), nearest.fresh()
    exact.merge_lora(loras.as_peft(lora), reference=nearest.float)
    twice.merge_lora(loras.as_peft(lora))
    # Weights are rounded anew, which moves errors either way: at most to 1.34 and 1.70 in 16 draws.
    assert nearest.error(exact, reference) < 1.5 * without
    assert nearest.error(twice, reference) < 2 * without


@pytest.mark.parametrize("subject", ["int8"], indirect=True)
def test_a_merged_model_is_saved(subject, tmp_path):
    merged = subject.fresh()
    merged.merge_lora(loras.as_peft(loras.random(subject.float, 4)))
    merged.save(tmp_path / "merged")
    again = wancompile.load(tmp_path / "merged")
    assert torch.equal(subject.run(again), subject.run(merged))
    assert not torch.equal(subject.run(again), subject.run(subject.compiled))
    again.load_lora(loras.as_peft(loras.random(subject.float, 4, seed=1)))
    merged.load_lora(loras.as_peft(loras.random(subject.float, 4, seed=1)))
    assert torch.equal(subject.run(again), subject.run(merged))


@pytest.mark.parametrize("subject", ["int8"], indirect=True)
def test_merging_nothing_changes_what_rounding_twice_does(subject):
    zeros = {path: (0 * a, b) for path, (a, b) in loras.random(subject.float, 4).items()}
    merged = subject.fresh()
    merged.merge_lora(loras.as_peft(zeros))
    assert subject.error(merged, subject.compiled) < 1e-6


def test_several_with_biases_at_scales(subject, model):
    one, two = loras.random(subject.float, 4), loras.random(subject.float, 20, seed=1)
    shifts = loras.biases(two)
    without = subject.error(model, subject.float)
    model.load_lora(loras.as_peft(one), name="one", scale=0.5)
    model.load_lora(loras.as_peft(two, shifts), name="two")
    assert model.loras == {"one": 0.5, "two": 1.0}
    both = loras.with_lora(subject.float, (0.5, one), (1.0, two), shifts=shifts)
    assert subject.error(model, both) < 1.15 * without
    model.set_lora({"one": -1.0})
    assert model.loras == {"one": -1.0, "two": 0.0}
    assert subject.error(model, loras.with_lora(subject.float, (-1.0, one))) < 1.15 * without
    model.unload_lora("one")
    model.set_lora({"two": 1.0})
    alone = loras.with_lora(subject.float, (1.0, two), shifts=shifts)
    assert subject.error(model, alone) < 1.15 * without


def test_without_any_effect_not_a_bit_changes(subject, model):
    before, program = subject.run(model), model.program
    model.load_lora(loras.as_peft(loras.random(subject.float, 4)))
    assert not torch.equal(subject.run(model), before)
    model.set_lora({})
    assert torch.equal(subject.run(model), before)
    model.set_lora({"default": 1.0})
    model.unload_lora("default")
    assert torch.equal(subject.run(model), before)
    assert model.program is program
    model.load_lora(loras.as_peft(loras.random(subject.float, 4)), scale=0)
    assert torch.equal(subject.run(model), before)


def test_a_swap_copies_numbers_and_nothing_else(subject, model, monkeypatch):
    first, second = (loras.as_peft(loras.random(subject.float, 8, seed=seed)) for seed in (0, 1))
    model.load_lora(first, name="a")
    program, output = model.program, subject.run(model)
    stored = {name: tensor.data_ptr() for name, tensor in program.state.items()}

    def fail(*_args, **_kwargs):
        raise AssertionError("a swap compiles nothing")

    monkeypatch.setattr("wancompile.pipeline.run", fail)
    model.load_lora(second, name="a")
    other = subject.run(model)
    model.set_lora({"a": 0.3})
    model.load_lora(first, name="a")
    assert model.program is program
    assert stored == {name: tensor.data_ptr() for name, tensor in program.state.items()}
    assert torch.equal(subject.run(model), output)
    assert relative_error(other, output) > 1e-3


@pytest.mark.parametrize("subject", ["int8"], indirect=True)
def test_more_than_there_is_room_for_makes_room(subject, model):
    small, large = (loras.random(subject.float, rank) for rank in (4, 40))
    model.load_lora(loras.as_peft(small), name="small")
    output = subject.run(model)
    model.load_lora(loras.as_peft(large), name="large")
    model.set_lora({"small": 1.0})
    assert relative_error(subject.run(model), output) < 1e-6


def test_groups_in_floating_point_and_with_static_scales_take_them_too(mixed):
    lora = loras.random(mixed.float, 4, wanted=lambda path: True)
    assert {"condition_embedder.time_proj", "proj_out", "blocks.0.attn1.to_v"} <= lora.keys()
    scaled = [w for group in mixed.compiled.report.groups for w in group.weights if w.outputs]
    assert any(not one.data for one in scaled)
    fused_gelu = torch.ops.wancompile.linear_gelu_quantize.default
    assert match.nodes_of(mixed.compiled.program.graph, fused_gelu)
    reference = loras.with_lora(mixed.float, (1.0, lora))
    without = mixed.error(mixed.compiled, mixed.float)
    merged = mixed.fresh()
    merged.merge_lora(loras.as_peft(lora), reference=mixed.float)
    assert mixed.error(merged, reference) < 1.5 * without
    branched = mixed.fresh()
    branched.load_lora(loras.as_peft(lora))
    assert mixed.error(branched, reference) < 1.3 * without
    float_linears = match.nodes_of(branched.program.graph, torch.ops.aten.linear.default)
    assert len(float_linears) > 3 * 5


@pytest.mark.parametrize("subject", ["int8"], indirect=True)
def test_what_was_kept_of_a_prompt_goes_with_the_lora(subject, model):
    """Keys and values of the text are computed once a prompt."""
    lora = loras.random(subject.float, 4, wanted=lambda path: path.endswith("attn2.to_k"))
    reference = loras.with_lora(subject.float, (1.0, lora))
    before = subject.run(model)
    model.load_lora(loras.as_peft(lora), scale=0.5)
    half = subject.run(model)
    model.set_lora({"default": 1.0})
    whole = subject.run(model)
    fresh = subject.fresh()
    fresh.load_lora(loras.as_peft(lora))
    assert torch.equal(subject.run(fresh), whole)
    assert not torch.equal(half, whole)
    assert not torch.equal(half, before)
    assert subject.error(model, reference) < 1.15 * subject.error(fresh, reference)


@pytest.mark.parametrize("subject", ["int8"], indirect=True)
def test_a_loaded_lora_is_no_part_of_an_artifact(subject, model, tmp_path):
    model.load_lora(loras.as_peft(loras.random(subject.float, 4)), name="style")
    with pytest.raises(ArtifactError, match="unload style, or merge it"):
        model.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    model.unload_lora("style")
    model.save(tmp_path / "out")
    again = wancompile.load(tmp_path / "out")
    lora = loras.as_peft(loras.random(subject.float, 4))
    for one in (model, again):
        one.load_lora(lora)
    assert torch.equal(subject.run(again), subject.run(model))


@pytest.mark.parametrize("subject", ["int8"], indirect=True)
def test_checks_need_inputs_and_a_reference_with_the_lora(subject, model):
    lora = loras.random(subject.float, 4)
    model.load_lora(loras.as_peft(lora))
    with pytest.raises(InputError, match="know no LoRA"):
        model.check()
    reference = loras.with_lora(subject.float, (1.0, lora))
    (ours,) = model.check(subject.call, reference=reference).outputs
    assert ours.relative < 0.01


def test_no_error_changes_anything(subject, model):
    lora = loras.as_peft(loras.random(subject.float, 4))
    model.load_lora(lora)
    output, program = subject.run(model), model.program
    broken = {name: tensor.clone() for name, tensor in lora.items()}
    broken[min(broken)][0, 0] = float("nan")
    for attempt in (
        lambda: model.load_lora(broken),
        lambda: model.load_lora(lora, scale=float("inf")),
        lambda: model.set_lora({"other": 1.0}),
        lambda: model.unload_lora("other"),
        lambda: model.merge_lora(lora, reference=nn.Linear(2, 2)),
        lambda: model.merge_lora(broken),
    ):
        with pytest.raises(LoraError):
            attempt()
    assert model.loras == {"default": 1.0}
    assert model.program is program
    assert torch.equal(subject.run(model), output)
