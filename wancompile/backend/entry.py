"""The function that dynamo calls, and the graphs that it does not compile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from wancompile.backend.capture import capture
from wancompile.backend.frozen import Frozen
from wancompile.backend.options import Choice
from wancompile.errors import DetectionError, InputError
from wancompile.ir import match

log = logging.getLogger("wancompile")

Compiled = Callable[..., Any]


def wancompile_backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Return what runs instead of `gm`: dynamo calls this once for each graph it captures.

    Raises:
        InputError: an option is unknown or of the wrong kind, or the call wants gradients, is on
            the meta device or under autocast.
        CalibrationError: the recipe needs statistics, or those given are of another model.
        WancompileError: as `wancompile.compile` does. Dynamo shows each of these as the
            `inner_exception` of its own `BackendCompilerFailed`.
    """
    if mode is not None:
        raise InputError(f"the backend has no mode {mode!r}: choose with options={{'recipe': ...}}")
    choice = Choice.of(options or {})
    if not _may_attend(gm.graph):
        return _as_it_is(gm, "no attention")
    _refuse_gradients(example_inputs)
    _refuse_meta(example_inputs)
    _refuse_autocast(gm.graph, example_inputs)
    captured = capture(gm)
    try:
        return Frozen(captured, choice, example_inputs)
    except DetectionError as error:
        return _as_it_is(gm, error.reason)


def _as_it_is(gm: GraphModule, reason: str) -> Compiled:
    log.info("a graph of %d nodes runs as it is: %s", len(gm.graph.nodes), reason)
    return gm.forward


# torch's own functions, not names of the model: without one of them nothing can be detected.
_ATTENTION = ("scaled_dot_product_attention", "softmax")


def _may_attend(graph: Graph) -> bool:
    return any(
        node.op.startswith("call_") and match.target_name(node).startswith(_ATTENTION)
        for node in graph.nodes
    )


def _refuse_gradients(inputs: Iterable[Any]) -> None:
    wanted = torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in inputs
    )
    if wanted:
        raise InputError(
            "8-bit models are for inference, but this call wants gradients: call the model under "
            "torch.inference_mode() or torch.no_grad(), or call model.requires_grad_(False)"
        )


def _refuse_meta(inputs: Iterable[Any]) -> None:
    if any(isinstance(value, torch.Tensor) and value.is_meta for value in inputs):
        raise InputError(
            "the weights to quantize are on the meta device, they have no values: load them first, "
            "or see with wancompile.trace what would be done to them"
        )


def _refuse_autocast(graph: Graph, inputs: Iterable[Any]) -> None:
    devices = {value.device.type for value in inputs if isinstance(value, torch.Tensor)}
    around = any(torch.is_autocast_enabled(device) for device in devices)
    if around or any(_enters_autocast(node) for node in graph.nodes):
        raise InputError(
            "autocast casts below the level at which the graph is captured: cast the model "
            "instead, as with model.to(torch.bfloat16), and call it outside of autocast"
        )


def _enters_autocast(node: Node) -> bool:
    is_entry = node.target is torch.amp.autocast_mode._enter_autocast
    return is_entry and bool(match.arg(node, 2, "enabled", True))
