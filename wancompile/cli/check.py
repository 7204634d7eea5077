"""`wancompile check`: what can be known of a saved model, with and without the original."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from torch import Tensor

import wancompile
from wancompile.cli import artifact, calls, play, prompts, source
from wancompile.cli.calls import Size
from wancompile.compiled import CompiledModel
from wancompile.errors import InputError
from wancompile.experts.compiled import CompiledPipeline
from wancompile.gate.check import Check
from wancompile.gate.limits import DEFAULT, Limits
from wancompile.gate.record import on_device
from wancompile.gate.text import check_text, summary
from wancompile.start import device_of
from wancompile.units import nbytes, plural

_DESCRIPTION = """\
Check a saved model: that every byte of its files is as it was written, that
all weights and scales are finite, and that a forward on random numbers is.
With --against, compare its outputs with those of the original on the same
numbers, and hold the errors to the limits that it was compiled within. With
--prompts, too, the original is a pipeline that is run on them, and some of its
calls take the place of random numbers.

Exits with 0 if all is well and with 1 if anything is not.
"""
# Timesteps differ from call to call.
_CALLS, _PLAYED = 2, 4


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "check",
        help="verify a saved model, alone or against the original",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    artifact.add_arguments(parser)
    calls.add_size(parser)
    play.add_arguments(parser.add_argument_group("calls of a pipeline"))


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `detail` are more lines for people."""

    name: str
    text: str
    passed: bool
    detail: str = ""


def run(args: argparse.Namespace) -> int:
    """Check every model of the artifact, print what was found, and return the exit code."""
    _check_usage(args)
    device = device_of(args.device)
    # All bytes of all experts are compared here; an error names the file that has changed.
    found = wancompile.load(args.artifact)
    experts = found.experts if isinstance(found, CompiledPipeline) else {"": found}
    print(_line(_files(args.artifact)))
    played = {} if args.prompts is None else _played(args, next(iter(experts.values())))
    failed = 0
    for part in list(experts):
        model = experts.pop(part).to(device)
        inputs = played.get(part or "transformer")
        findings = check(model, inputs, args.size, args.against, part)
        print(f"{part or args.artifact.resolve().name}: {_of(model)}")
        print("\n".join(map(_line, findings)), flush=True)
        failed += sum(not one.passed for one in findings)
    print(f"{plural(failed, 'check')} failed" if failed else "all is well")
    return 1 if failed else 0


def _check_usage(args: argparse.Namespace) -> None:
    if args.prompts is not None and args.against is None:
        args.parser.error("--prompts are for the pipeline that --against names")
    if args.prompts is not None and args.size is not None:
        args.parser.error("with --prompts the size is that of --frames, --height and --width")
    alone = next((name for name in play.OPTIONS if getattr(args, name) is not None), None)
    if args.prompts is None and alone is not None:
        args.parser.error(f"--{alone.replace('_', '-')} goes with --prompts")


def _played(args: argparse.Namespace, model: CompiledModel) -> dict[str, list[play.Call]]:
    """Run the pipeline that `model` is an expert of, and return calls of each expert."""
    words, given = prompts.read(args.prompts), play.given(args)
    if not source.is_pipeline_folder(args.against):
        raise InputError(f"{args.against} is a transformer, and --prompts need a whole pipeline")
    print("loading the pipeline", file=sys.stderr)
    pipe = source.open_pipeline(args.against, model.dtype)
    data = source.arguments(pipe, words, given)
    pipe.to(args.device)
    return play.calls_of(pipe, data, _PLAYED)


def check(
    model: CompiledModel,
    played: Sequence[play.Call] | None,
    size: Size | None,
    against: Path | None,
    part: str = "",
) -> list[Finding]:
    """Return what is known of a model by running it, beside the original if there is one.

    Args:
        model: what was loaded.
        played: calls to run it on; random ones of `size` if not given.
        size: of the latents; one that the model was compiled with if not given.
        against: the folder of the original.
        part: the name of the expert in it, "" for the only one.

    Raises:
        InputError: the model cannot be called at that size, or `against` holds another model.
    """
    inputs = played or [calls.random_call(model, seed, size) for seed in range(_CALLS)]
    gate = model.report.gate
    limits = gate.check.limits if gate else DEFAULT
    if not played:
        # How often random numbers reach the largest code of a calibrated scale says nothing.
        limits = replace(limits, clipped=inf)
    kind = f"of {part or 'the transformer'} in the pipeline" if played else "of random numbers"
    findings = [_weights(model.program.state), _compiled(model), _forward(model, inputs, kind)]
    if against is not None:
        findings.append(_against(model, inputs, limits, against, part))
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


def _forward(model: CompiledModel, inputs: Sequence[Mapping[str, Any]], kind: str) -> Finding:
    found = model.check(list(inputs))
    shapes = f"{plural(len(inputs), 'call')} {kind}, {calls.describe(inputs[0])}"
    if found.broken:
        place, count = next(iter(found.broken.items()))
        return Finding("forward", f"{shapes}: {count:,} NaN or infinite values in {place}", False)
    return Finding("forward", f"{shapes}: all values finite", True)


def _against(
    model: CompiledModel,
    inputs: Sequence[Mapping[str, Any]],
    limits: Limits,
    folder: Path,
    part: str,
) -> Finding:
    place = artifact.original_folder(folder, part)
    original = artifact.original(place, artifact.Made.of(model), model.device)
    first = on_device(inputs[0], model.device)
    reference = wancompile.trace(original, first, dynamic=False)
    found: Check = model.check(list(inputs), reference=reference, limits=limits)
    text = "all errors within limits" if found.passed else "too far from it"
    return Finding(f"against {folder}", text, found.passed, check_text(found))
