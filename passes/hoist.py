"""Split a program in two: what stays the same from call to call, and the rest.

Law: a value that depends on some inputs alone is a function of them. With c the inputs that stay
the same over a denoising loop and x the others, `f(x, c) = body(x, c, prologue(c))`, bit for bit:
the same ops run on the same values, only earlier.

    before                            prologue                      body
    %n = rms_norm(linear(%c, W), g)   %n = rms_norm(linear(%c, W))  %cached_0 = input
    %k = permute(reshape(%n))         return [%n]                   %k = permute(reshape(%cached_0))
    %y = attention(%q, %k, %v)                                      %y = attention(%q, %k, %v)

What is handed over is what owns memory: layouts and casts that only widen are done again in the
body. Sizes are numbers that both parts ask their inputs for. Which inputs stay the same is an
option; `steady.py` finds the encoder states. Neither pass has a place in the line: the two parts
are made of one LOWERED program, side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from wancompile.ir import match
from wancompile.ir.edit import Draft
from wancompile.ir.levels import Level
from wancompile.passes.steady import cut
from wancompile.signature import InputSpec, Signature

aten = torch.ops.aten


@dataclass(frozen=True)
class TakePrologue:
    """Leave what depends on the inputs of these names alone: from them to what is handed over."""

    inputs: tuple[str, ...]

    name: ClassVar[str] = "take_prologue"
    needs: ClassVar[Level] = Level.LOWERED
    gives: ClassVar[Level] = Level.LOWERED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Return what is handed over instead of the model's output."""
        if all(node.name in self.inputs for node in match.inputs(draft.graph)):
            return  # it is a prologue
        found = cut(draft.graph, self.inputs)
        specs = _specs(draft)
        for node, (source, dim) in found.sizes.items():
            draft.replace_call(node, aten.sym_size.int, source, dim)
        draft.give(found.kept)
        draft.groups, draft.ungrouped = (), ()
        draft.erase_dead()
        taken = []
        for node in match.inputs(draft.graph):
            if node in found.steady:
                taken.append(specs[node.name])
            else:
                draft.drop_input(node)
        draft.signature = _signature(taken, pytree.tree_structure([0] * len(found.kept)))
        for node in found.kept:
            draft.did(node, "computed once for each prompt")


@dataclass(frozen=True)
class TakeBody:
    """Leave the rest: from all inputs, and behind them what is handed over, to the outputs."""

    inputs: tuple[str, ...]

    name: ClassVar[str] = "take_body"
    needs: ClassVar[Level] = Level.LOWERED
    gives: ClassVar[Level] = Level.LOWERED
    exact: ClassVar[bool] = True

    def apply(self, draft: Draft) -> None:
        """Make an input of each value that is handed over."""
        assert draft.signature is not None, "a program has a signature"
        found = cut(draft.graph, self.inputs)
        draft.groups, draft.ungrouped = (), ()
        for node, (source, dim) in found.sizes.items():
            if match.args(node)[0] in found.steady:
                draft.replace_call(node, aten.sym_size.int, source, dim)
        taken = []
        for index, node in enumerate(found.kept):
            new = draft.take(f"cached_{index}", like=node)
            draft.did(node, "read from the cache")
            node.replace_all_uses_with(new)
            taken.append(_spec(new))
        every = (*draft.signature.inputs, *taken)
        draft.signature = _signature(every, draft.signature.output)


def _specs(draft: Draft) -> dict[str, InputSpec]:
    """Return the specifications of the inputs by the names that the graph gives them."""
    assert draft.signature is not None, "a program has a signature"
    pairs = zip(match.inputs(draft.graph), draft.signature.inputs, strict=True)
    return {node.name: spec for node, spec in pairs}


def _spec(node: Node) -> InputSpec:
    shape = tuple(None if match.is_symbolic(size) else int(size) for size in match.shape(node))
    return InputSpec(node.name, shape, match.val(node).dtype)


def _signature(inputs: Iterable[InputSpec], output: pytree.TreeSpec) -> Signature:
    """Return a signature whose parameters are the tensors themselves."""
    specs = tuple(inputs)
    return Signature(tuple(one.name for one in specs), {}, specs, {}, output)
