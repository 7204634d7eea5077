"""Helpers of the pass tests: small modules in, programs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from wancompile import pipeline
from wancompile.export import export
from wancompile.ir import text
from wancompile.passes import NORMALIZE
from wancompile.pipeline import Pass
from wancompile.program import Program


class Function(nn.Module):
    """A function of named tensors as a module; `tensors` become its parameters."""

    def __init__(self, fn: Callable[..., Any], **tensors: torch.Tensor) -> None:
        super().__init__()
        self.fn = fn
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: torch.Tensor) -> Any:
        return self.fn(self, x)


class Streams(Function):
    """A function of video, text and image states: `fn(self, x, text, image)`."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, text: torch.Tensor, image: torch.Tensor
    ) -> Any:
        return self.fn(self, x, text, image)


def exported(fn: Callable[..., Any], x: torch.Tensor, **tensors: torch.Tensor) -> Program:
    """Export `fn(self, x)`; x [batch, tokens, channels] is dynamic in batch and tokens."""
    module = Function(fn, **tensors)
    other = x.repeat(*(3 if dim < 2 else 1 for dim in range(x.dim())))
    return export(module, [{"x": x}, {"x": other}])


def before(program: Program, last: type) -> Program:
    """Run the normalizing passes that come before `last`."""
    index = [type(one) for one in NORMALIZE].index(last)
    return pipeline.run(program, NORMALIZE[:index])


def run_pass(program: Program, one: Pass) -> Program:
    """Run one pass, check that a second run changes nothing, and return the result."""
    after = pipeline.run(program, [one])
    if one.needs == one.gives:
        again = pipeline.run(after, [one])
        assert text.render(again.graph) == text.render(after.graph), (
            "a second run changed the graph"
        )
    return after


def normalized(
    fn: Callable[..., Any], x: torch.Tensor, one: Pass, **tensors: torch.Tensor
) -> Program:
    """Export, run the passes before `one`, then `one`."""
    return run_pass(before(exported(fn, x, **tensors), type(one)), one)


def counts(program: Program) -> dict[str, int]:
    """Op counts by short name."""
    return text.op_counts(program.graph)


def table(program: Program) -> str:
    """Return the groups and what is in none as text, one line each."""
    groups = [
        f"{group.role}: {', '.join(group.members)} | reads {group.source} | 1/s in {group.fold}"
        + (f": {group.fold_reason}" if group.fold_reason else "")
        for group in program.groups
    ]
    rest = [f"no group: {one.site}: {one.reason}" for one in program.ungrouped]
    return "\n".join([*groups, *rest]) + "\n"


def error(
    program: Program, fn: Callable[..., Any], x: torch.Tensor, **tensors: torch.Tensor
) -> float:
    """Relative error of `program` on `x` against `fn` computed in fp64."""
    reference = Function(fn, **tensors).double()
    with torch.no_grad():
        expected = reference(x.double() if x.is_floating_point() else x)
    return pipeline.relative_error(program(x=x), expected)
