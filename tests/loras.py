"""Random LoRAs for the tests, and float models with them merged in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Factors = dict[str, tuple[Tensor, Tensor]]
SIZE = 0.1
"""How large B A is beside the weight: of trained LoRAs it is a few percent to a few tenths."""


def random(
    model: nn.Module,
    rank: int,
    *,
    seed: int = 0,
    wanted: Callable[[str], bool] = lambda path: path.startswith("blocks."),
) -> Factors:
    """Return A `[rank, K]` and B `[N, rank]` for the linears whose path is wanted.

    Channels that are small in the weight, as their activations are large, are small in the LoRA.
    """
    generator = torch.Generator().manual_seed(seed)
    found: Factors = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and wanted(path):
            weight = module.weight.detach()
            rows, columns = weight.shape
            down = torch.randn(rank, columns, generator=generator) * weight.square().mean(0).sqrt()
            up = torch.randn(rows, rank, generator=generator)
            up *= weight.square().mean(1, keepdim=True).sqrt()
            up *= SIZE * weight.norm() / (up @ down).norm()
            found[path] = down, up
    return found


def biases(factors: Factors, seed: int = 0) -> dict[str, Tensor]:
    """Return a bias for every B, of the size of its rows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: torch.randn(up.shape[0], generator=generator) * up.square().mean(1).sqrt()
        for path, (_, up) in factors.items()
    }


def as_peft(factors: Factors, shifts: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the state dict as diffusers saves it."""
    found = {}
    for path, (down, up) in factors.items():
        found[f"transformer.{path}.lora_A.weight"] = down
        found[f"transformer.{path}.lora_B.weight"] = up
    for path, shift in (shifts or {}).items():
        found[f"transformer.{path}.lora_B.bias"] = shift
    return found


def with_lora(
    model: nn.Module,
    *added: tuple[float, Factors],
    shifts: Mapping[str, Tensor] | None = None,
) -> Any:
    """Return a copy whose weights are W + scale B A, computed in fp64."""
    merged: Any = copy.deepcopy(model)
    for scale, factors in added:
        for path, (down, up) in factors.items():
            linear = merged.get_submodule(path)
            delta = scale * (up.double() @ down.double())
            linear.weight.data = (linear.weight.double() + delta).to(linear.weight.dtype)
    for path, shift in (shifts or {}).items():
        merged.get_submodule(path).bias.data += shift
    return merged
