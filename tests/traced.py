"""Programs of the zoo, traced once for all tests that only read them."""

from __future__ import annotations

from functools import cache

from torch import Tensor, nn
from zoo import make

import wancompile
from wancompile import pipeline
from wancompile.export import export
from wancompile.passes import NORMALIZE
from wancompile.program import Program


@cache
def dynamic(variant: str) -> tuple[nn.Module, dict[str, Tensor], Program, Program]:
    """Return model, arguments, and the EXPORTED and the NORMAL program, for any size of video."""
    model, kwargs = make(variant)
    exported = export(model, [kwargs])
    normal = pipeline.run(exported, NORMALIZE, probe=pipeline.Probe(kwargs))
    return model, kwargs, exported, normal


@cache
def fixed(variant: str, layers: int) -> Program:
    """Return the NORMAL program for one size of video, without weights: quicker to trace."""
    model, kwargs = make(variant, layers)
    on_meta = {name: tensor.to("meta") for name, tensor in kwargs.items()}
    return wancompile.trace(model.to("meta"), on_meta, dynamic=False)
