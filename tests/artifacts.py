"""Helpers of the artifact tests: one small model, compiled once and saved once per recipe."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import zoo
from torch import Tensor

import wancompile
from wancompile.artifact import document
from wancompile.compiled import CompiledModel


@cache
def compiled(variant: str, recipe: str) -> CompiledModel:
    model, kwargs = zoo.make(variant, layers=1)
    return wancompile.compile(model, [kwargs], recipe)


def output(model: CompiledModel, call: dict[str, Tensor]) -> Tensor:
    return model(**call, return_dict=False)[0]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the document of an artifact and give it the checksum that goes with it."""
    data = document.read(folder)
    change(data)
    (folder / document.FILE).write_text(document.render(data), encoding="utf-8")


def calls(variant: str) -> list[dict[str, Tensor]]:
    """Calls of three batch sizes and three sizes of latents, one of them the smallest there is."""
    found = [zoo.example(variant, layers=1, batch=batch, seed=batch) for batch in (1, 3)]
    found.append(zoo.make(variant, layers=1, batch=2, latent=(5, 8, 12))[1])
    return [{name: torch.clone(tensor) for name, tensor in call.items()} for call in found]
