"""`wancompile check`: what can be known of a saved model, with and without the original."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from textwrap import indent

import torch
from torch import Tensor

import wancompile
from wancompile.cli import artifact, calls
from wancompile.cli.calls import Size
from wancompile.compiled import CompiledModel
from wancompile.experts.compiled import CompiledPipeline
from wancompile.gate.check import Check
from wancompile.gate.limits import DEFAULT
from wancompile.gate.text import check_text, summary
from wancompile.start import device_of
from wancompile.units import nbytes, plural

_DESCRIPTION = """\
Check a saved model: that every byte of its files is as it was written, that
all weights and scales are finite, and that a forward on random numbers is.
With --against, compare its outputs with those of the original on the same
numbers, and hold the errors to the limits that it was compiled within.

Exits with 0 if all is well and with 1 if anything is not.
"""
# Timesteps differ from call to call.
_CALLS = 2


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "check",
        help="verify a saved model, alone or against the original",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    artifact.add_arguments(parser)
    calls.add_size(parser)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `detail` are more lines for people."""

    name: str
    text: str
    passed: bool
    detail: str = ""


def run(args: argparse.Namespace) -> int:
    """Check every model of the artifact, print what was found, and return the exit code."""
    device = device_of(args.device)
    # All bytes of all experts are compared here; an error names the file that has changed.
    found = wancompile.load(args.artifact)
    experts = found.experts if isinstance(found, CompiledPipeline) else {"": found}
    print(_line(_files(args.artifact)))
    failed = 0
    for part in list(experts):
        model = experts.pop(part).to(device)
        findings = check(model, args.size, args.against, part)
        print(f"{part or args.artifact.resolve().name}: {_of(model)}")
        print("\n".join(map(_line, findings)), flush=True)
        failed += sum(not one.passed for one in findings)
    print(f"{plural(failed, 'check')} failed" if failed else "all is well")
    return 1 if failed else 0


def check(
    model: CompiledModel, size: Size | None, against: Path | None, part: str = ""
) -> list[Finding]:
    """Return what is known of a model by running it, beside the original if there is one.

    Raises:
        InputError: the model cannot be called at that size, or `against` holds another model.
    """
    inputs = [calls.random_call(model, seed, size) for seed in range(_CALLS)]
    findings = [_weights(model.program.state), _compiled(model), _forward(model, inputs)]
    if against is not None:
        findings.append(_against(model, inputs, against, part))
    return findings


def _line(one: Finding) -> str:
    mark = "ok    " if one.passed else "FAILED"
    more = f"\n{indent(one.detail, '    ')}" if one.detail else ""
    return f"  {mark}  {one.name}: {one.text}{more}"


def _of(model: CompiledModel) -> str:
    groups = plural(len(model.report.groups), "group")
    return f"{model.report.recipe.name}, {groups} of linears, {nbytes(model.nbytes)} in memory"


def _files(folder: Path) -> Finding:
    size = nbytes(artifact.size_on_disk(folder))
    count = plural(len(artifact.files(folder)), "file")
    return Finding("files", f"{count}, {size}, every byte as written", True)


def _weights(state: Mapping[str, Tensor]) -> Finding:
    broken = [name for name, tensor in state.items() if not _is_finite(tensor)]
    if broken:
        text = f"{plural(len(broken), 'tensor')} with NaN or infinity, the first is {broken[0]}"
        return Finding("weights", text, False)
    return Finding("weights", f"{plural(len(state), 'tensor')}, all numbers finite", True)


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # torch has no isfinite for 8-bit types
    return bool(torch.isfinite(tensor).all())


def _compiled(model: CompiledModel) -> Finding:
    gate = model.report.gate
    if gate is None:
        return Finding("when compiled", "not compared with the original", True)
    return Finding("when compiled", summary(gate.check), gate.check.passed)


def _forward(model: CompiledModel, inputs: Sequence[Mapping[str, Tensor]]) -> Finding:
    found = model.check(list(inputs))
    shapes = f"{plural(len(inputs), 'call')} of random numbers, {calls.describe(inputs[0])}"
    if found.broken:
        place, count = next(iter(found.broken.items()))
        return Finding("forward", f"{shapes}: {count:,} NaN or infinite values in {place}", False)
    return Finding("forward", f"{shapes}: all values finite", True)


def _against(
    model: CompiledModel, inputs: Sequence[Mapping[str, Tensor]], folder: Path, part: str
) -> Finding:
    place = artifact.original_folder(folder, part)
    original = artifact.original(place, artifact.Made.of(model), model.device)
    reference = wancompile.trace(original, inputs[0], dynamic=False)
    gate = model.report.gate
    # How often random numbers reach the largest code of a calibrated scale says nothing.
    limits = replace(gate.check.limits if gate else DEFAULT, clipped=inf)
    found: Check = model.check(list(inputs), reference=reference, limits=limits)
    text = "all errors within limits" if found.passed else "too far from it"
    return Finding(f"against {folder}", text, found.passed, check_text(found))
