"""A Wan of two blocks, calibrated, traced and compiled once for all tests of the gate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import zoo
from once import Traced
from torch import Tensor, nn

import wancompile
from wancompile.compiled import CompiledModel
from wancompile.gate.limits import Limits
from wancompile.quant.stats import Stats

OPEN = Limits(*[math.inf] * 5)


def calls(count: int, layers: int = 2, first: int = 10) -> list[dict[str, Any]]:
    return [zoo.example("t2v", layers, seed=first + index) for index in range(count)]


@cache
def wan() -> nn.Module:
    """A T2V model of two blocks."""
    return zoo.make("t2v", 2)[0]


@cache
def data() -> list[dict[str, Any]]:
    return calls(6)


@cache
def stats() -> Stats:
    return wancompile.calibrate(wan(), data()[:3])


@cache
def int8() -> CompiledModel:
    return wancompile.compile(wan(), data(), "int8-attention")


@cache
def traced() -> Traced:
    return Traced.on(wan(), example=data()[0])


def float_output(model: nn.Module, call: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**call, return_dict=False)[0]
