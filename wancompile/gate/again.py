"""Checks at any time after compiling: on the calls kept from then, or on new ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from wancompile.errors import InputError
from wancompile.gate.check import Check, check_records
from wancompile.gate.evidence import Evidence
from wancompile.gate.limits import Limits
from wancompile.gate.record import Record, on_device, take
from wancompile.program import Program
from wancompile.signature import name_arguments, parameters_of

Inputs = Mapping[str, Any] | Sequence[Mapping[str, Any] | Sequence[Any]]
"""One call by name, or several, each by name or by position."""


def check_again(
    program: Program,
    evidence: Evidence | None,
    inputs: Inputs | None,
    reference: torch.nn.Module | Program | None,
    limits: Limits,
) -> Check:
    """Return the figures of a compiled `program`; see `CompiledModel.check`."""
    if inputs is None:
        if reference is not None:
            raise InputError("a reference needs inputs to be compared on")
        if evidence is None:
            raise InputError(
                "there are no calls kept from compiling to check on: give inputs, and a reference"
            )
        calls: Sequence[Mapping[str, Any]] = evidence.calls
    else:
        calls = _named(program, inputs)
        evidence = _evidence(calls, reference)
    records = [take(program, call, fused=True)[1] for call in calls]
    references = None if evidence is None else evidence.references
    held_out = evidence is not None and evidence.held_out
    return check_records(program, records, references, held_out=held_out, limits=limits)


def _named(program: Program, inputs: Inputs) -> list[dict[str, Any]]:
    given: Iterable[Any] = [inputs] if isinstance(inputs, Mapping) else inputs
    signature = program.signature
    calls = []
    for one in given:
        args, kwargs = ((), one) if isinstance(one, Mapping) else (one, {})
        calls.append(name_arguments(signature.parameters, signature.defaults, args, kwargs))
    if not calls:
        raise InputError("there is no call among the inputs")
    return calls


def _evidence(
    calls: Sequence[Mapping[str, Any]], reference: torch.nn.Module | Program | None
) -> Evidence | None:
    """Return what the reference does on the calls: a module tells its output alone."""
    if reference is None:
        return None
    if isinstance(reference, Program):
        return Evidence.of(reference, calls, held_out=True)
    records = tuple(_output_of(reference, call) for call in calls)
    return Evidence(tuple(calls), records, held_out=True)


def _output_of(model: torch.nn.Module, call: Mapping[str, Any]) -> Record:
    parameters, _ = parameters_of(model.forward)
    device = next((one.device for one in model.parameters()), None)
    moved = dict(call) if device is None else on_device(call, device)
    if "return_dict" in parameters:
        moved["return_dict"] = False
    with torch.no_grad():
        output = model(**moved)
    leaves = [one for one in pytree.tree_leaves(output) if isinstance(one, Tensor)]
    return Record(tuple(one.detach().cpu() for one in leaves), {}, {}, {}, {}, {})
