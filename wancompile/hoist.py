"""Compute what depends on the prompt alone once for each prompt, not once for each step.

`passes/hoist.py` splits a program; here the two parts run. What the first hands over is kept for
the last few prompts, so that a conditional and an unconditional one may take turns.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from wancompile import pipeline
from wancompile.errors import InputError
from wancompile.ir import match
from wancompile.passes.hoist import TakeBody, TakePrologue
from wancompile.passes.steady import Cut, cut, steady_inputs
from wancompile.program import Program
from wancompile.prompts import PromptCache
from wancompile.stream import Stream
from wancompile.units import nbytes, plural

log = logging.getLogger("wancompile")


@dataclass(frozen=True)
class Hoisting:
    """What is computed once for each prompt.

    `inputs` are the names of the inputs that it is computed from; `linears` counts those of the
    model, `weight_bytes` the stored tensors that nothing else reads, and `moved_bytes` how many of
    these are on the host. `cached_bytes` is what is kept of one prompt of the sizes that the model
    was traced with, `prompts` of how many it is kept.
    """

    inputs: tuple[str, ...]
    linears: int
    weight_bytes: int
    cached_bytes: int
    prompts: int = 0
    moved_bytes: int = 0

    def __str__(self) -> str:
        moved = f", {nbytes(self.moved_bytes)} of them on the host" if self.moved_bytes else ""
        return (
            f"once for each prompt ({', '.join(self.inputs)}): {plural(self.linears, 'linear')}, "
            f"weights of {nbytes(self.weight_bytes)}{moved}; "
            f"{nbytes(self.cached_bytes)} kept of each of the last {plural(self.prompts, 'prompt')}"
        )


def find(program: Program, inputs: Sequence[str] | None = None) -> Cut | None:
    """Return where `program` falls apart, or None if nothing can be computed ahead.

    Args:
        program: from level NORMAL on.
        inputs: the names of the inputs that stay the same; if not given, the encoder states.

    Raises:
        InputError: there is no input of that name, or none that varies.
    """
    if inputs is None:
        found = cut(program.graph, steady_inputs(program.graph, program.attentions))
    else:
        specs = [spec.name for spec in program.signature.inputs]
        unknown = [name for name in inputs if name not in specs]
        if unknown:
            raise InputError(f"there is no input {unknown[0]!r}; there are {', '.join(specs)}")
        if set(specs) <= set(inputs):
            raise InputError("some input must vary from call to call, but all are said to stay")
        pairs = zip(specs, match.inputs(program.graph), strict=True)
        found = cut(program.graph, [node.name for name, node in pairs if name in inputs])
    return found if found.kept else None


def facts(program: Program, found: Cut) -> Hoisting:
    """Return what is gained where `find` has found a cut of `program`."""
    specs = [spec.name for spec in program.signature.inputs]
    pairs = zip(specs, match.inputs(program.graph), strict=True)
    return Hoisting(
        inputs=tuple(name for name, node in pairs if node in found.steady),
        linears=sum(match.site(node) is not None for node in found.hoisted),
        weight_bytes=sum(program.state[name].nbytes for name in found.weights),
        cached_bytes=sum(_nbytes(node) for node in found.kept),
    )


def _nbytes(node: Node) -> int:
    """Return the bytes of a value, in the call that was traced where sizes are open."""
    sizes = (s if isinstance(s, int) else int(s.node.hint) for s in match.shape(node))
    return math.prod(sizes) * match.val(node).element_size()


@dataclass(frozen=True)
class Split:
    """A program in two parts.

    `prologue` takes the inputs at `places` of the whole one, and returns what `body` takes behind
    all inputs.
    """

    prologue: Program
    body: Program
    places: tuple[int, ...]

    @property
    def alone(self) -> frozenset[str]:
        """The names of the stored tensors that the prologue reads and the body does not."""
        return frozenset(self.prologue.state.keys() - self.body.state.keys())

    def holding(self, tensors: Mapping[str, Tensor]) -> Split:
        """Return both parts, the prologue with these tensors in the place of its own."""
        return replace(self, prologue=holding(self.prologue, tensors))


def split(program: Program, inputs: tuple[str, ...]) -> Split:
    """Return both parts of a LOWERED `program`, which share its tensors.

    `inputs` are those of a `Cut` of it, or of the FUSED program that it was.
    """
    order = match.inputs(program.graph)
    return Split(
        prologue=pipeline.run(program, [TakePrologue(inputs)]),
        body=pipeline.run(program, [TakeBody(inputs)]),
        places=tuple(index for index, node in enumerate(order) if node.name in inputs),
    )


def is_apart(device: torch.device) -> bool:
    """Whether what is on the host is not on `device`."""
    return device.type != "cpu"


def to_host(program: Program, names: Collection[str], device: torch.device) -> dict[str, Tensor]:
    """Return these stored tensors of `program` on the host, page-locked if `device` is a GPU."""
    moved = {name: program.state[name].to("cpu") for name in names}
    if device.type == "cuda":
        moved = {name: tensor.pin_memory() for name, tensor in moved.items()}
    return moved


def holding(program: Program, tensors: Mapping[str, Tensor]) -> Program:
    """Return `program` with these stored tensors, of the same numbers, in the place of its own."""
    state = {name: tensors.get(name, tensor) for name, tensor in program.state.items()}
    return replace(program, state=state)


class Loop:
    """Runs both parts of a program, the first only where it sees a new prompt.

    Calls come from one stream of a GPU, as those of a pipeline do.

    Attributes:
        cache: what the prologue returned for the last prompts.
        away: whether weights of the prologue come to the device only to be used.
    """

    def __init__(self, parts: Split, prompts: int, device: torch.device, *, away: bool) -> None:
        self.away = away
        self.body = parts.body.module
        self._parts = parts
        self._device = device
        self._begin(prompts)

    def _begin(self, prompts: int) -> None:
        prologue = self._parts.prologue
        self.cache = PromptCache(prompts)
        self._prologue: Callable[..., Any] = (
            Stream(prologue, self._device) if self.away else prologue
        )

    def renew(self) -> None:
        """Begin again, as numbers of stored tensors have changed.

        What was kept of prompts is of the old ones, and so is what a stream has copies of.
        """
        self._begin(self.cache.size)

    def described(self, gain: Hoisting) -> Hoisting:
        """Return what is gained, with what is kept of how many prompts and what is moved.

        LoRAs beside weights of the prologue count among these.
        """
        state, alone = self._parts.prologue.state, self._parts.alone
        stays = self._prologue.state if isinstance(self._prologue, Stream) else state
        return replace(
            gain,
            prompts=self.cache.size,
            weight_bytes=sum(state[name].nbytes for name in alone),
            moved_bytes=sum(state[name].nbytes for name in alone - stays.keys()),
        )

    def __call__(self, *tensors: Tensor) -> Any:
        """Return the leaves of the output for the inputs of the whole program, in order."""
        steady = [tensors[place] for place in self._parts.places]
        kept = self.cache.find(steady)
        if kept is None:
            log.debug("a new prompt: what depends on it alone is computed")
            kept = self.cache.keep(steady, self._prologue(*steady))
        return self.body(*tensors, *kept)
