"""Runs a captured graph with its weights in 8 bits."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.backends.registry import lookup_backend

from wancompile import passes, pipeline
from wancompile.backend.capture import Captured
from wancompile.backend.options import Choice
from wancompile.ir import match
from wancompile.program import Program

log = logging.getLogger("wancompile")

Runs = Callable[..., Any]


class Frozen:
    """Runs a captured graph with its weights in 8 bits, one set for each set that it is given.

    Dynamo takes weights for inputs: two blocks of the same shape may share one graph, and a weight
    may change between calls. So every call is checked against the weights that were quantized.
    """

    def __init__(self, captured: Captured, choice: Choice, args: Sequence[Any]) -> None:
        self._captured = captured
        self._choice = choice
        self._versions = [_Version.of(self._stored(args), self._compile(args))]

    def __call__(self, *args: Any) -> Any:
        """Run on one call's arguments, weights included, as dynamo passes them."""
        module = self._module(args)
        with torch.no_grad():
            return module(*(args[at] for at in self._captured.inputs))

    def _stored(self, args: Sequence[Any]) -> list[torch.Tensor]:
        return [args[at] for at in self._captured.stored]

    def _device(self, args: Sequence[Any]) -> torch.device:
        """Return where the weights are; a number may reach a model on a GPU as a CPU tensor."""
        values = [args[at] for at in (*self._captured.stored, *self._captured.inputs)]
        return next(value.device for value in values if isinstance(value, torch.Tensor))

    def _module(self, args: Sequence[Any]) -> Runs:
        weights = self._stored(args)
        for version in self._versions:
            if version.is_of(weights):
                return version.module
        log.info("other weights than those that were quantized: quantizing them")
        self._versions = [one for one in self._versions if one.may_be_asked_for(weights)]
        self._versions.append(_Version.of(weights, self._compile(args)))
        return self._versions[-1].module

    def _compile(self, args: Sequence[Any]) -> Runs:
        choice = self._choice
        call = self._captured.call(args)
        has_numbers = any(not isinstance(value, torch.Tensor) for value in call.values())
        probe = None if has_numbers else pipeline.Probe(call)
        with torch.no_grad():
            program = pipeline.run(self._captured.program(args), passes.NORMALIZE, probe=probe)
            choice.recipe.check(program.groups, program.attentions)
            before = program.nbytes
            program = pipeline.run(
                program, passes.smoothing(choice.recipe, choice.stats), probe=probe
            )
            program = pipeline.run(program, passes.quantization(choice.recipe, choice.stats))
            steps = (*passes.FUSE, *passes.lowering(self._device(args)))
            program = pipeline.run(program, steps)
        log.info(
            "compiled a graph of %d groups: weights %.1f MB -> %.1f MB",
            len(program.groups),
            before / 1e6,
            program.nbytes / 1e6,
        )
        return _by_inductor(program) if choice.inductor else program.module


def _by_inductor(program: Program) -> Runs:
    """Hand what is left in torch's own ops to Inductor; it calls the compiler's ops as they are.

    The sizes of the inputs stay open as dynamo left them: its guards are those of the graph.
    """
    module = program.module
    values = [match.val(node) for node in module.graph.find_nodes(op="placeholder")]
    compiled: Runs = lookup_backend("inductor")(module, values)
    return compiled


@dataclass(frozen=True)
class _Version:
    """A module, and the weights that it holds in 8 bits: which tensors, and torch's change counts.

    Weights are held weakly: freeing the model frees its weights.
    """

    weights: tuple[weakref.ref[torch.Tensor], ...]
    counts: tuple[int, ...]
    module: Runs

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor], module: Runs) -> _Version:
        return cls(tuple(map(weakref.ref, weights)), tuple(map(_changes, weights)), module)

    def is_of(self, weights: Sequence[torch.Tensor]) -> bool:
        return self._names(weights) and self.counts == tuple(map(_changes, weights))

    def may_be_asked_for(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether this can be of use again: not if `weights` are its own, changed, or some died."""
        return not self._names(weights) and all(one() is not None for one in self.weights)

    def _names(self, weights: Sequence[torch.Tensor]) -> bool:
        return all(mine() is one for mine, one in zip(self.weights, weights, strict=True))


def _changes(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
