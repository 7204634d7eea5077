"""Naming where a linear's input comes from; shared by the detections. Reads only."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from wancompile.ir import match
from wancompile.ir.dataflow import tensor_inputs
from wancompile.ir.site import Source
from wancompile.passes.folds import affine, modulation

aten = torch.ops.aten

_NORMS = (aten.layer_norm.default, aten.rms_norm.default)


def of_stream(linear: Node) -> Source:
    """Say how the video stream reaches `linear`: through which kind of norm, if any."""
    producer: Any = match.args(linear)[0]
    if modulation.read(producer) is not None:
        return Source.MODULATED_NORM
    if affine.read(producer) is not None:
        return Source.AFFINE_NORM
    return Source.STREAM


def is_normalised(value: Any) -> bool:
    """Whether any norm lies between the model's inputs and `value`."""
    seen: set[Node] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if match.is_op(node, *_NORMS):
            return True
        todo.extend(tensor_inputs(node))
    return False
