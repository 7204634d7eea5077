"""Artifacts on a GPU: the same kernels, the same bits, and no copy left on the host."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import wancompile
from wancompile import presets
from wancompile.compiled import CompiledModel


def made(name: str, recipe: str) -> tuple[CompiledModel, dict[str, torch.Tensor]]:
    """One block at the width of the published model, random weights, compiled on the GPU."""
    preset = presets.truncated(presets.find(name), 1)
    torch.manual_seed(0)
    model: nn.Module = presets.build(preset, device="cuda", dtype=torch.bfloat16)
    given = presets.example_inputs(preset, latent=(3, 8, 12), device="cuda", dtype=torch.bfloat16)
    return wancompile.compile(model, [given], recipe=recipe), given


# Every recipe once, and every way to be conditioned once: a case takes a quarter of a minute.
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("t2v-1.3b", "int8"),
        ("t2v-1.3b", "fp8"),
        ("t2v-1.3b", "fp8-attention"),
        ("i2v-14b", "int8-attention"),
        ("ti2v-5b", "int8-attention"),
    ],
)
def test_a_loaded_model_computes_the_same_bits(cuda, tmp_path, name, recipe):
    compiled, given = made(name, recipe)
    compiled.save(tmp_path / "model")
    loaded = wancompile.load(tmp_path / "model", device=cuda)
    assert loaded.device.type == "cuda"
    assert all(tensor.is_cuda for tensor in loaded.program.state.values())
    assert loaded.program.print() == compiled.program.print()
    expected = compiled(**given, return_dict=False)[0]
    assert torch.equal(loaded(**given, return_dict=False)[0], expected)
    through_cpu = wancompile.load(tmp_path / "model").to(cuda)
    assert torch.equal(through_cpu(**given, return_dict=False)[0], expected)
    loaded.save(tmp_path / "again")
    for path in (tmp_path / "model").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_weights_go_to_the_device_once(cuda, tmp_path):
    compiled, _ = made("t2v-1.3b", "int8")
    compiled.save(tmp_path / "model")
    size = compiled.nbytes
    del compiled
    wancompile.load(tmp_path / "model", device=cuda)  # contexts and libraries
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = wancompile.load(tmp_path / "model", device=cuda)
    assert torch.cuda.max_memory_allocated() - before < 1.05 * size + (1 << 20)
    with open("/proc/self/maps", encoding="utf-8") as file:
        assert not any("weights-" in line for line in file)
    assert loaded.nbytes == size
