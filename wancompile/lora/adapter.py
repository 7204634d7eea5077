"""A LoRA: two factors for each linear that it changes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wancompile.errors import LoraError

_PART = re.compile(
    r"(?:transformer\.)?(.+)\.lora_(A|B|down|up)(?:\.(?!weight|bias)\w+)?\.(weight|bias)"
)
_ALPHA = re.compile(r"(?:transformer\.)?(.+)\.alpha")
_KIND = {"A": "down", "B": "up"}


@dataclass(frozen=True, eq=False)
class Factors:
    """What is added to one linear: `x -> scale * (x @ down.T @ up.T + bias)`.

    Invariants: `down [R, K]`, `up [N, R]` and `bias [N]`, which may be None, are finite floats.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]


Adapter = Mapping[str, Factors]
"""Factors by the path of the linear in the model."""


def parse(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """Return the adapter whose tensors have names as `files.read` gives them.

    A prefix `transformer.` is left out. Where there is a `NAME.alpha`, `scale` is alpha over rank.

    Raises:
        LoraError: a name is no part of a LoRA, A or B is missing, ranks differ, or a value is NaN
            or infinite; with the name.
    """
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        path, kind = _meaning(name)
        if kind in found[path]:
            raise LoraError(f"{name} is there twice")
        if not bool(torch.isfinite(tensor).all()):
            raise LoraError(f"{name} holds NaN or infinity")
        found[path][kind] = tensor.detach()
    return {path: _factors(path, parts) for path, parts in found.items()}


def _meaning(name: str) -> tuple[str, str]:
    """Return the path of the linear, and which of `down`, `up`, `bias` and `alpha` this is."""
    if alpha := _ALPHA.fullmatch(name):
        return alpha[1], "alpha"
    part = _PART.fullmatch(name)
    if part is None:
        raise LoraError(f"{name} is no part of a LoRA that is known here")
    kind = _KIND.get(part[2], part[2])
    if part[3] == "weight":
        return part[1], kind
    if kind == "down":
        raise LoraError(f"{name}: only B may have a bias")
    return part[1], "bias"


def _factors(path: str, parts: Mapping[str, Tensor]) -> Factors:
    missing = [
        side for side, kind in (("A", "down"), ("B", "up")) if kind not in parts
    ]  # a bias alone needs neither, but nothing that is known stores it so
    if missing:
        raise LoraError(f"{path} has no {' and no '.join(missing)} in this LoRA")
    down, up, bias = parts["down"], parts["up"], parts.get("bias")
    if down.dim() != 2 or up.dim() != 2:
        raise LoraError(f"{path} is no linear: A is {list(down.shape)}, B is {list(up.shape)}")
    if down.shape[0] != up.shape[1] or down.shape[0] == 0:
        raise LoraError(
            f"the ranks of {path} differ: A is {list(down.shape)}, B is {list(up.shape)}"
        )
    if bias is not None and bias.shape != up.shape[:1]:
        raise LoraError(f"the bias of {path} is {list(bias.shape)}, B is {list(up.shape)}")
    alpha = parts.get("alpha")
    return Factors(down, up, bias, 1.0 if alpha is None else float(alpha) / down.shape[0])
