"""LoRAs on the experts of a pipeline: who gets what, and all of them or none."""

from __future__ import annotations

import pipes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loras
import pytest
import torch
import zoo
from safetensors.torch import save_file
from torch import Tensor, nn

import wancompile
from wancompile import CompiledModel, CompiledPipeline
from wancompile.errors import LoraError
from wancompile.pipeline import relative_error

HIGH, LOW = "transformer", "transformer_2"
NAMES = (HIGH, LOW)
RANK = 4


@pytest.fixture(scope="module")
def originals() -> dict[str, nn.Module]:
    return {name: zoo.make("t2v", 1, seed=seed)[0] for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def call() -> dict[str, Tensor]:
    return zoo.make("t2v", 1)[1]


@pytest.fixture(scope="module")
def made(originals, call) -> CompiledPipeline:
    experts = {
        name: wancompile.compile(model, recipe="fp8", example_inputs=call, limits=None)
        for name, model in originals.items()
    }
    return CompiledPipeline(experts, dict.fromkeys(experts), 0.875)


@pytest.fixture
def both(made) -> Iterator[CompiledPipeline]:
    """The compiled experts, which have no LoRA before and after."""
    assert not any(made.loras.values())
    yield made
    for name in {one for loaded in made.loras.values() for one in loaded}:
        made.unload_lora(name)


@pytest.fixture
def alone(both) -> CompiledPipeline:
    """A pipeline of one expert."""
    return CompiledPipeline({HIGH: both.experts[HIGH]}, {HIGH: None}, None)


@pytest.fixture(scope="module")
def one(originals) -> loras.Factors:
    return loras.random(originals[HIGH], RANK)


@pytest.fixture(scope="module")
def other(originals) -> loras.Factors:
    return loras.random(originals[LOW], RANK, seed=1)


def named(factors: loras.Factors, part: str) -> dict[str, Tensor]:
    """Names that begin with a part of the pipeline, or with none."""
    prefix = f"{part}." if part else ""
    stored = loras.as_peft(factors)
    return {prefix + name.removeprefix("transformer."): tensor for name, tensor in stored.items()}


def fresh(both: CompiledPipeline) -> CompiledPipeline:
    """The experts anew, for changes that stay; the weights are shared."""
    copies = {
        name: CompiledModel(model._fused, model.report, model.config, model.dtype)
        for name, model in both.experts.items()
    }
    return CompiledPipeline(copies, both.calibrated, both.boundary)


def outputs(both: CompiledPipeline, call: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: output(model, call) for name, model in both.experts.items()}


def output(model: nn.Module, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**call, return_dict=False)[0]


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


# Who gets what ---------------------------------------------------------------------------------


def test_each_expert_gets_its_own(both, originals, call, one, other):
    without = {
        name: relative_error(output(model, call), output(originals[name], call))
        for name, model in both.experts.items()
    }
    both.load_lora({**named(one, HIGH), **named(other, LOW)}, name="style")
    assert both.loras == {HIGH: {"style": 1.0}, LOW: {"style": 1.0}}
    for name, factors in ((HIGH, one), (LOW, other)):
        reference = output(loras.with_lora(originals[name], (1.0, factors)), call)
        wrong = output(originals[name], call)
        found = output(both.experts[name], call)
        assert relative_error(found, reference) < 1.2 * without[name]
        assert relative_error(found, wrong) > 1.5 * without[name]


@pytest.mark.parametrize(
    ("part", "expert", "gets"),
    [
        (HIGH, None, HIGH),
        (LOW, None, LOW),
        ("", HIGH, HIGH),
        ("", LOW, LOW),
        (HIGH, LOW, LOW),  # diffusers writes `transformer` for either
        (LOW, LOW, LOW),
        ("diffusion_model", LOW, LOW),
    ],
)
def test_one_expert_gets_it(both, call, one, part, expert, gets):
    stored = named(one, part)
    if part == "diffusion_model":
        stored = {name: t for name, t in stored.items() if ".ffn.net.0.proj." in name}
        stored = {name.replace("net.0.proj", "0"): tensor for name, tensor in stored.items()}
    before = outputs(both, call)
    both.load_lora(stored, expert=expert)
    assert [name for name, loaded in both.loras.items() if loaded] == [gets]
    assert changed(before, outputs(both, call)) == [gets]


def test_files_by_expert_and_scales(both, call, one, other, tmp_path):
    files = {HIGH: tmp_path / "high.safetensors", LOW: tmp_path / "low.safetensors"}
    for name, factors in ((HIGH, one), (LOW, other)):
        save_file(named(factors, ""), files[name])
    before = outputs(both, call)
    both.load_lora({name: str(path) for name, path in files.items()}, name="a", scale=0.5)
    both.load_lora(files[LOW], name="b", expert=LOW)
    assert both.loras == {HIGH: {"a": 0.5}, LOW: {"a": 0.5, "b": 1.0}}
    both.set_lora({"b": 2.0})
    assert both.loras == {HIGH: {"a": 0.0}, LOW: {"a": 0.0, "b": 2.0}}
    assert changed(before, outputs(both, call)) == [LOW]
    both.set_lora({"a": 1.0}, expert=HIGH)
    assert both.loras == {HIGH: {"a": 1.0}, LOW: {"a": 0.0, "b": 2.0}}
    both.unload_lora("a", expert=LOW)
    both.unload_lora("b")
    assert both.loras == {HIGH: {"a": 1.0}, LOW: {}}
    both.unload_lora("a")
    assert not changed(before, outputs(both, call))


def test_with_one_expert_nothing_need_be_said(alone, one):
    for part in ("", HIGH):
        alone.load_lora(named(one, part), name=f"from {part}")
    assert list(alone.loras[HIGH]) == ["from ", "from transformer"]


def test_an_expert_by_another_name_gets_what_diffusers_names_transformer(alone, one):
    renamed = CompiledPipeline({"denoise": alone.experts[HIGH]}, {"denoise": None}, None)
    renamed.load_lora(named(one, HIGH), name="a")
    renamed.load_lora(named(one, "denoise"), name="b")
    assert renamed.loras == {"denoise": {"a": 1.0, "b": 1.0}}


def test_it_works_when_attached_and_after_loading(both, call, one, other, tmp_path):
    both.save(tmp_path / "wan")
    again = wancompile.load(tmp_path / "wan")
    assert isinstance(again, CompiledPipeline)
    pipe = pipes.make("t2v22")
    again.attach(pipe)
    plain = pipes.run(pipe, pipes.arguments("t2v22"))
    for compiled in (both, again):
        compiled.load_lora({**named(one, HIGH), **named(other, LOW)})
    assert not changed(outputs(both, call), outputs(again, call))
    assert relative_error(pipes.run(pipe, pipes.arguments("t2v22")), plain) > 0.01


# Merged ----------------------------------------------------------------------------------------


def test_merged_with_the_originals_of_a_pipeline(both, originals, call, one, other):
    merged = fresh(both)
    components = {**originals, "vae": nn.Linear(2, 2), "transformer_3": None}
    merged.merge_lora({**named(one, HIGH), **named(other, LOW)}, reference=components)
    for name, factors in ((HIGH, one), (LOW, other)):
        without = relative_error(output(both.experts[name], call), output(originals[name], call))
        reference = output(loras.with_lora(originals[name], (1.0, factors)), call)
        assert relative_error(output(merged.experts[name], call), reference) < 1.5 * without
    assert not any(merged.loras.values())


def test_a_reference_for_each(both, originals, one, other):
    stored = {**named(one, HIGH), **named(other, LOW)}
    with pytest.raises(LoraError, match="for transformer and transformer_2: give a reference for"):
        both.merge_lora(stored, reference=originals[HIGH])
    with pytest.raises(LoraError, match="hold no model for the expert transformer_2"):
        both.merge_lora(stored, reference={HIGH: originals[HIGH], LOW: None})
    merged = fresh(both)
    merged.merge_lora(named(other, LOW), reference=originals[LOW])
    assert merged.experts[HIGH]._fused is both.experts[HIGH]._fused
    assert merged.experts[LOW]._fused is not both.experts[LOW]._fused


# All or none -----------------------------------------------------------------------------------


def broken(factors: loras.Factors) -> loras.Factors:
    """Factors of which one B has too few rows."""
    path = next(iter(factors))
    return {**factors, path: (factors[path][0], factors[path][1][1:])}


REFUSED = [
    ({"parts": {"": 0}}, r"which expert it is for, and fits transformer and transformer_2: pass e"),
    ({"parts": {"": 0}, "expert": "vae"}, "has no expert 'vae', but transformer, transformer_2"),
    ({"parts": {LOW: 1}, "expert": HIGH}, "is for transformer_2, not for transformer"),
    ({"parts": {"": 0, LOW: 1}}, r"begin with transformer_2 and others with no part.*pass expert="),
    ({"parts": {HIGH: 0, LOW: 2}}, r"(?s)another model: .*\n  expert: transformer_2"),
    ({"parts": {"": 2}}, r"fits none of transformer, transformer_2: the LoRA is of another model"),
    ({"parts": {"": 2}, "expert": LOW}, r"(?s)another model: .*\n  expert: transformer_2"),
    ({"by": {HIGH: 0, "vae": 0}}, "has no expert 'vae'"),
    ({"by": {HIGH: 0}, "expert": HIGH}, "by its name, or expert=, not both"),
]


@pytest.mark.parametrize(("asked", "reason"), REFUSED)
def test_what_fits_nobody_changes_nobody(both, call, one, other, asked, reason):
    before = outputs(both, call)
    kinds = (one, other, broken(other))
    stored: dict[str, Any] = {}
    for part, kind in asked.get("parts", {}).items():
        stored.update(named(kinds[kind], part))
    stored.update({at: named(kinds[kind], "") for at, kind in asked.get("by", {}).items()})
    for work in (both.load_lora, both.merge_lora):
        with pytest.raises(LoraError, match=reason):
            work(stored, expert=asked.get("expert"))
    assert both.loras == {HIGH: {}, LOW: {}}
    assert not changed(before, outputs(both, call))


def test_an_expert_that_is_not_there_is_named(alone, one, other):
    whole = {**named(one, HIGH), **named(other, LOW)}
    reason = r'the pipeline has no transformer_2: it has transformer; expert="transformer" loads'
    with pytest.raises(LoraError, match=reason):
        alone.load_lora(whole)
    with pytest.raises(LoraError, match=r"has no transformer_2: it has transformer$"):
        alone.load_lora(named(other, LOW))
    assert alone.loras == {HIGH: {}}
    alone.load_lora(whole, expert=HIGH)
    assert alone.loras == {HIGH: {"default": 1.0}}


def test_unknown_names_and_scales_change_nothing(both, one):
    both.load_lora(named(one, HIGH), name="a")
    for attempt in (
        lambda: both.set_lora({"a": 2.0, "b": 1.0}),
        lambda: both.set_lora({"a": 2.0}, expert=LOW),
        lambda: both.set_lora({"a": float("nan")}),
        lambda: both.unload_lora("b"),
        lambda: both.unload_lora("a", expert=LOW),
        lambda: both.load_lora(named(one, HIGH), name="c", scale=float("inf")),
    ):
        with pytest.raises(LoraError):
            attempt()
        assert both.loras == {HIGH: {"a": 1.0}, LOW: {}}


@pytest.mark.parametrize("kind", ["load_lora", "set_lora", "merge_lora"])
def test_where_the_second_one_fails_the_first_is_as_it_was(
    both, call, one, other, kind, monkeypatch
):
    """Whatever goes wrong, as when memory ends: the second expert cannot be lowered or run."""
    experts = fresh(both)
    whole = {**named(one, HIGH), **named(other, LOW)}
    experts.load_lora(whole, name="kept")
    before, fused = outputs(experts, call), experts.experts[HIGH]._fused
    second = experts.experts[LOW]
    run, failed = second._run, []

    def fail_once(program: Any) -> None:
        if not failed:
            failed.append(program)
            raise MemoryError("no room")
        run(program)

    monkeypatch.setattr(second, "_run", fail_once)
    given = {"kept": 0.5} if kind == "set_lora" else whole
    with pytest.raises(MemoryError, match="no room"):
        getattr(experts, kind)(given)
    assert failed
    assert experts.loras == {HIGH: {"kept": 1.0}, LOW: {"kept": 1.0}}
    assert experts.experts[HIGH]._fused is fused
    assert not changed(before, outputs(experts, call))


def test_a_file_that_is_none_is_told(both, tmp_path: Path):
    with pytest.raises(LoraError, match="cannot be read as safetensors"):
        both.load_lora(tmp_path / "missing.safetensors")
    with pytest.raises(LoraError, match="the LoRA is empty"):
        both.load_lora({})
