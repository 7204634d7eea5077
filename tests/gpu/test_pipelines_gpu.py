"""Pipelines on a GPU: experts that come and go, and parts that diffusers moves."""

from __future__ import annotations

import pipes
from typing import Any

import pytest
import torch
from torch import nn

import wancompile
from wancompile import presets

# Blocks of 1536 channels and 8960 in the MLP: 80 MiB of weights each in bf16.
PRESET = presets.truncated(presets.find("t2v-1.3b"), 6)


class Two:
    """A pipeline of two experts that are as large as matters, and of nothing else."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        self.first, self.second = first, second
        self.given = presets.example_inputs(PRESET, latent=(3, 16, 16), device="cpu")

    @property
    def components(self) -> dict[str, nn.Module]:
        return {"first": self.first, "second": self.second}

    def __call__(self, prompt: str) -> None:
        for step in (990.0, 900.0, 600.0, 300.0):
            model = self.first if step >= 875 else self.second
            model(**{**self.given, "timestep": torch.full((1,), step)})


def expert(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return presets.build(PRESET, device="cpu")


def test_the_device_never_holds_both_experts(cuda):
    pipe = Two(expert(0), expert(1))
    bytes_of_one = sum(one.nbytes for one in pipe.first.parameters())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    compiled = wancompile.compile(pipe, ["a cat"], "int8", device=cuda)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - base < 1.5 * bytes_of_one
    assert pipe.first is compiled.experts["first"]
    assert pipe.first.device == torch.device("cpu")


def test_other_parts_may_be_on_the_gpu_while_experts_come_and_go(cuda):
    """What an expert returns lies where the pipeline computes, not where its weights are."""
    pipe = pipes.make("t2v22")
    pipe.text_encoder.to(cuda)
    compiled = wancompile.compile(pipe, [pipes.arguments("t2v22", steps=3)], device=cuda)
    assert {name: model.device.type for name, model in compiled.experts.items()} == {
        "transformer": "cpu",
        "transformer_2": "cpu",
    }
    pipe.to(cuda)
    expected = pipes.run(pipes.make("t2v22").to(cuda), pipes.arguments("t2v22", steps=3))
    found = pipes.run(pipe, pipes.arguments("t2v22", steps=3))
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.03


def test_offloading_takes_turns_of_compiled_experts(cuda):
    pytest.importorskip("accelerate", reason="diffusers offloads by accelerate's hooks")
    pipe = pipes.make("t2v22")
    compiled = wancompile.compile(pipe, [pipes.arguments("t2v22", steps=3)], device=cuda)
    pipe.to(cuda)
    expected = pipes.run(pipe, pipes.arguments("t2v22", steps=3))
    pipe.enable_model_cpu_offload()
    placed: list[tuple[str, str]] = []

    def look(pipe: Any, step: int, timestep: torch.Tensor, given: dict[str, Any]) -> dict[str, Any]:
        del step, timestep, given
        placed.append((pipe.transformer.device.type, pipe.transformer_2.device.type))
        return {}

    for _ in range(2):
        call = {**pipes.arguments("t2v22", steps=3), "callback_on_step_end": look}
        assert torch.equal(pipes.run(pipe, call), expected)
    assert ("cuda", "cuda") not in placed
    assert {one.device.type for one in compiled.experts.values()} == {"cpu"}
