"""A program at level FUSED as JSON data, but for the numbers in its tensors and its groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from wancompile.artifact import facts, graph, inputs, values
from wancompile.artifact.weights import Stored
from wancompile.errors import ArtifactError
from wancompile.ir import match
from wancompile.ir.levels import Level
from wancompile.ir.site import Attention
from wancompile.program import Program

_ROUNDS = 4


def describe(program: Program) -> dict[str, Any]:
    """Return data from which `rebuild` makes `program` again, and which it is the data of.

    The second is more than the first: on the way torch may prove a narrower range of a dimension
    than the export did. It is also the proof, before anything is written, that it can be read.

    Raises:
        ArtifactError: something in the graph or the signature cannot be saved.
    """
    stored = stored_tensors(program.state)
    data = _data(program)
    for _ in range(_ROUNDS):
        again = _data(rebuild(data, stored))
        if again == data:
            return data
        data = again
    raise ArtifactError("the ranges of the program's dimensions do not settle")


def _data(program: Program) -> dict[str, Any]:
    fakes = [match.val(node) for node in program.graph.find_nodes(op="placeholder")]
    return {
        "attentions": facts.to_data(program.attentions),
        "inputs": facts.to_data(inputs.of_graph(program.signature, fakes)),
        "signature": inputs.signature_data(program.signature),
        "nodes": graph.to_data(program.graph),
    }


def rebuild(data: Mapping[str, Any], stored: Mapping[str, Stored]) -> Program:
    """Return the program that `describe` described, without groups and stored tensors.

    Raises:
        ArtifactError: the graph names unknown ops or does not fit together.
    """
    taken = facts.from_data(inputs.Inputs, data["inputs"])
    mode, fakes = inputs.fakes(taken)
    return Program(
        graph=graph.from_data(data["nodes"], fakes, _fakes(stored, mode), mode),
        state={},
        level=Level.FUSED,
        signature=inputs.signature_from(data["signature"], taken),
        attentions=facts.from_data(tuple[Attention, ...], data["attentions"]),
    )


def stored_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, Stored]:
    """Return dtype and shape of each stored tensor."""
    return {n: Stored(values.dtype_name(t.dtype), tuple(t.shape)) for n, t in state.items()}


def _fakes(stored: Mapping[str, Stored], mode: FakeTensorMode) -> dict[str, torch.Tensor]:
    """Return a fake tensor for each stored one; like those of the inputs, on the CPU."""
    with mode:
        kinds = {
            one: torch.empty(one.shape, dtype=values.dtype_named(one.dtype), device="cpu")
            for one in dict.fromkeys(stored.values())
        }
    return {name: kinds[one] for name, one in stored.items()}
