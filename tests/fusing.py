"""Functions whose first result is rounded per token, as FUSED programs, and what they must compute.

A function `fn(self, x)` returns a float value, or that and more results. `program` appends the
quantise op, with `self.inv` as its 1/s if there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from kit import Function, before, exported
from small import largest
from torch import Tensor

from wancompile.ir import match
from wancompile.ir.levels import Level
from wancompile.passes import NameSites
from wancompile.pipeline import relative_error
from wancompile.program import Program

TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}

Fn = Callable[..., Any]


def program(fn: Fn, x: Tensor, dtype: str = "int8", **tensors: Tensor) -> Program:
    """Return `fn` with its first result rounded, called a FUSED program: nothing is fused yet."""
    return called_fused(partial(_rounding, fn, TYPES[dtype]), x, **tensors)


def called_fused(fn: Fn, x: Tensor, **tensors: Tensor) -> Program:
    """Export a function that calls 8-bit ops by name, and normalize what is around them."""
    return replace(before(exported(fn, x, **tensors), NameSites), level=Level.FUSED)


def _rounding(fn: Fn, dtype: torch.dtype, self: Any, x: Tensor) -> tuple[Tensor, ...]:
    value, *rest = _results(fn(self, x))
    op = torch.ops.wancompile.quantize_per_token
    return (*op(value, getattr(self, "inv", None), dtype), *rest)


def _results(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def exact(fn: Fn, x: Tensor, **tensors: Tensor) -> list[Tensor]:
    """Return what `fn` computes in fp64, the first result times 1/s."""
    module = Function(fn, **tensors).double()
    with torch.no_grad():
        value, *rest = _results(module(x.double()))
    return [value.double() * tensors.get("inv", torch.ones(())).double(), *rest]


def values(rounded: Program, x: Tensor) -> list[Tensor]:
    """Return the results of a program in fp64, the first dequantized."""
    q, scale, *rest = rounded(x=x)
    return [q.double() * scale.double(), *(one.double() for one in rest)]


def errors(rounded: Program, fn: Fn, x: Tensor, **tensors: Tensor) -> list[float]:
    """Return the relative L2 error of each result against fp64."""
    wanted = exact(fn, x, **tensors)
    return [relative_error(*pair) for pair in zip(values(rounded, x), wanted, strict=True)]


def assert_nearest(rounded: Program, fn: Fn, x: Tensor, dtype: str = "int8", **tensors: Tensor):
    """Check that an fp32 program rounds to the nearest 8-bit number of what fp64 computes."""
    q, scale, *rest = rounded(x=x)
    value, *others = exact(fn, x, **tensors)
    top = value.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale.double(), top / largest(dtype), rtol=1e-5, atol=0)
    step = scale.double()
    half = step / 2 if dtype == "int8" else torch.maximum(value.abs() / 16, step / 1024)
    off = (q.double() * step - value).abs()
    assert (off <= half * 1.001 + top * 1e-6).all()
    for one, other in zip(rest, others, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


def assert_neighbours(one: Program, other: Program, x: Tensor) -> None:
    """Check that two fp32 programs round alike, but for what lies between two 8-bit numbers."""
    (a, a_scale, *_), (b, b_scale, *_) = one(x=x), other(x=x)
    torch.testing.assert_close(a_scale, b_scale, rtol=1e-5, atol=0)
    differs = a.float() != b.float()
    assert differs.float().mean() < 0.01
    step = torch.maximum(a.float().abs() / 8, torch.tensor(1.0))
    assert ((a.float() - b.float()).abs() <= step).all()


def assert_no_farther(fused: Program, plain: Program, fn: Fn, x: Tensor, **tensors: Tensor) -> None:
    """Check that a fused 16-bit program is not farther from fp64 than the unfused one."""
    found = (errors(one, fn, x, **tensors) for one in (fused, plain))
    for ours, theirs in zip(*found, strict=True):
        assert ours < 1.02 * theirs


def skips(rewritten: Program) -> list[str]:
    """Return the reasons of the last pass for what it left alone."""
    return [note.text for note in rewritten.records[-1].skipped]


def calls(rewritten: Program, name: str) -> list[tuple[Any, ...]]:
    """Return the arguments of all calls of a semantic op."""
    op = getattr(torch.ops.wancompile, name).default
    return [match.args(node) for node in match.nodes_of(rewritten.graph, op)]
