"""What the tests of torch.export and of torch.compile share: a model, and calls of two sizes."""

from __future__ import annotations

from typing import Any

import torch
import zoo
from torch import Tensor, nn

import wancompile
from wancompile.compiled import CompiledModel

SIZES = [(2, (5, 8, 12)), (3, (3, 12, 8))]


def compiled_apart(model: nn.Module) -> CompiledModel:
    """Compile, with what depends on the prompt apart, as ever."""
    found = wancompile.compile(model, recipe="fp8", example_inputs=call(0), limits=None)
    assert found._loop is not None
    return found


def call(at: int) -> dict[str, Tensor]:
    batch, latent = SIZES[at]
    return zoo.make("t2v", 1, batch=batch, latent=latent, seed=batch)[1]


def output(model: Any, kwargs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**kwargs, return_dict=False)[0]
