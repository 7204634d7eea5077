"""LoRAs on a model whose prompt-dependent weights wait on the host, a GPU's part played by a CPU.

What goes to the host is copied, as it would be from a GPU, so that a number which is changed in one
place only shows. That every value is computed on the GPU is seen in `test_lora_branch` and, with
one, in `gpu/test_hoist_gpu`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import loras
import pytest
import torch
import zoo
from torch import Tensor, nn

import wancompile
from wancompile import hoist, stream
from wancompile.compiled import CompiledModel
from wancompile.errors import LoraError
from wancompile.program import Program


class Host:
    """Copies what is not yet there, and remembers what is."""

    def __init__(self) -> None:
        self._there: dict[int, Tensor] = {}

    def __call__(
        self, program: Program, names: Collection[str], device: torch.device
    ) -> dict[str, Tensor]:
        del device
        return {name: self._sent(program.state[name]) for name in names}

    def _sent(self, tensor: Tensor) -> Tensor:
        if not self.holds(tensor):
            tensor = tensor.clone()
            self._there[id(tensor)] = tensor
        return tensor

    def holds(self, tensor: Tensor) -> bool:
        return id(tensor) in self._there


@pytest.fixture
def host(monkeypatch) -> Host:
    found = Host()
    monkeypatch.setattr(hoist, "is_apart", lambda device: True)
    monkeypatch.setattr(hoist, "to_host", found)
    return found


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    return zoo.make("t2v", 1)[0]


@pytest.fixture(scope="module")
def call() -> dict[str, Tensor]:
    return zoo.make("t2v", 1)[1]


@pytest.fixture(scope="module")
def made(wan, call) -> CompiledModel:
    return wancompile.compile(wan, recipe="fp8", example_inputs=call, limits=None)


def fresh(made: CompiledModel) -> CompiledModel:
    return CompiledModel(made.fused, made.report, made.config, made.dtype)


@pytest.fixture(params=[64, 1 << 20], ids=["moving", "copied"])
def pair(request, made, host, monkeypatch) -> tuple[CompiledModel, CompiledModel]:
    """The model as it is, and the same one with weights on the host.

    Of these, large ones come and go and small ones have copies on the device: here all or none.
    """
    monkeypatch.setattr(stream, "_SMALL", request.param)
    here, away = fresh(made), fresh(made)
    away.hoist(offload=True)
    assert away._loop is not None
    assert away._loop.away
    return here, away


def output(model: nn.Module, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**call, return_dict=False)[0]


def everywhere(wan: nn.Module, rank: int, seed: int = 0) -> dict[str, Tensor]:
    """A LoRA for every linear, with biases; those that embed the text are in floating point."""
    factors = loras.random(wan, rank, seed=seed, wanted=lambda path: True)
    assert "condition_embedder.text_embedder.linear_1" in factors
    return loras.as_peft(factors, loras.biases(factors))


def alone(model: CompiledModel) -> dict[str, Tensor]:
    """What a new prompt alone needs of what the model runs with."""
    parts = hoist.split(model.program, hoist.find(model.fused).inputs)
    return {name: model.program.state[name] for name in parts.alone}


def steps(wan: nn.Module) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    return [
        ("load_lora", (everywhere(wan, 4),), {"name": "a"}),
        ("load_lora", (everywhere(wan, 4, seed=1),), {"name": "a"}),  # into the same room
        ("load_lora", (everywhere(wan, 20, seed=2),), {"name": "b", "scale": 0.5}),
        ("set_lora", ({"a": 0.5},), {}),
        ("set_lora", ({},), {}),
        ("set_lora", ({"a": 1.0, "b": 1.0},), {}),
        ("unload_lora", ("a",), {}),
        ("merge_lora", (everywhere(wan, 4, seed=3),), {}),
        ("unload_lora", ("b",), {}),
    ]


def test_every_step_gives_the_bits_that_it_gives_without(pair, wan, call, host):
    here, away = pair
    last = output(here, call)
    for name, args, kwargs in steps(wan):
        for model in pair:
            getattr(model, name)(*args, **kwargs)
        found = output(here, call)
        assert torch.equal(output(away, call), found)
        assert torch.equal(output(away, call), found)  # the prompt is known
        assert not torch.equal(found, last)
        last = found
        waiting = alone(away)
        assert all(map(host.holds, waiting.values()))
        hoisting, before = away.report.hoisting, here.report.hoisting
        assert hoisting.weight_bytes == sum(one.nbytes for one in waiting.values())
        assert hoisting.weight_bytes == before.weight_bytes
    away.hoist(0)
    assert torch.equal(output(away, call), last)


def test_factors_beside_waiting_weights_wait_too(pair, wan, host):
    _, away = pair
    weights = alone(away)
    bare = away.report.hoisting
    away.load_lora(everywhere(wan, 4))
    added = alone(away).keys() - weights.keys()
    beside = {name.removeprefix("low_rank.").rpartition(".")[0] for name in added}
    assert beside <= weights.keys()
    assert any("attn2" in name for name in beside)
    others = [
        tensor
        for name, tensor in away.program.state.items()
        if name.startswith("low_rank.") and name not in added
    ]
    assert others
    assert not any(map(host.holds, others))
    assert away.report.hoisting.weight_bytes > bare.weight_bytes


def test_another_lora_in_the_same_room_lowers_and_splits_nothing(pair, wan, monkeypatch):
    _, away = pair
    away.load_lora(everywhere(wan, 4))
    program = away.program

    def fail(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("numbers are copied, and nothing else")

    monkeypatch.setattr("wancompile.pipeline.run", fail)
    away.load_lora(everywhere(wan, 4, seed=1))
    away.set_lora({"default": 0.25})
    assert away.program is program


def test_an_error_changes_nothing(pair, wan, call):
    _, away = pair
    away.load_lora(everywhere(wan, 4), name="a")
    before = output(away, call)
    broken = everywhere(wan, 4)
    broken[min(broken)] = broken[min(broken)][:, 1:]
    for work in (away.load_lora, away.merge_lora):
        with pytest.raises(LoraError, match="another model"):
            work(broken)
    assert torch.equal(output(away, call), before)


def test_what_is_loaded_before_goes_to_the_host_with_it(made, wan, call, host):
    here, away = fresh(made), fresh(made)
    for model in (here, away):
        model.load_lora(everywhere(wan, 4))
    away.hoist(offload=True)
    assert all(map(host.holds, alone(away).values()))
    assert any(name.startswith("low_rank.") for name in alone(away))
    assert torch.equal(output(away, call), output(here, call))
